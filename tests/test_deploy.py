"""What `deploy/` holds and the packaging, each checked by its own tool; skipped where the tool is missing."""
from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import command_line
import process_control
import restarts
from browser import Browser, browser
from http_protocol import Limits
from restarts import HANG, ROOT, Service
from service_metrics import Age, Metrics

__all__ = ["browser"]  # a fixture

DEPLOY = ROOT / "deploy"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
MAIN = (sys.executable, str(ROOT / "main.py"))
MESSAGE = json.dumps({"PhoneNumber": "48123456789", "Content": "Hi"})
CLIENT = """\
from fastsmsing import InMemoryClient

def factory():
    print("made here", flush=True)
    return InMemoryClient()
"""


def tool(name: str) -> str:
    """The program's path; skips the test where there is none."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, its output taken as text."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SMSPROXY_")}
    words, env = [str(word) for word in command], inherited | environ
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=10 * HANG, check=False)


def fetch(
    port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}, *, source: str = ""
) -> tuple[int, bytes]:
    """One request on a connection of its own, from this address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single file."""
    file = tmp_path_factory.mktemp("pyz") / "smsproxy.pyz"
    made = run(sys.executable, DEPLOY / "make_pyz.py", file)
    assert (made.returncode, made.stderr) == (0, "")
    return file


@pytest.fixture(scope="module")
def service(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The single file, serving."""
    with restarts.serving(tmp_path_factory.mktemp("service"), command=(sys.executable, str(pyz))) as service:
        yield service
        assert service.stop() == 0


# The single file


def test_the_single_file_holds_every_module_and_nothing_that_lies_around(tmp_path: Path) -> None:
    modules = {path.name for path in ROOT.glob("*.py")}
    tree = tmp_path / "tree"
    for name in (*modules, "postgres", "openapi.json", "page.html", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    (tree / "shop_client.py").write_text("import smsproxy\n")
    (tree / "postgres" / "notes.txt").write_text("nothing that runs\n")
    made = runpy.run_path(str(DEPLOY / "make_pyz.py"))["make"]
    made(tmp_path / "made.pyz", tree)
    with zipfile.ZipFile(tmp_path / "made.pyz") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packages = {f"postgres/{path.name}" for path in ROOT.glob("postgres/*.py")}
    assert names == modules | packages | {"__main__.py", "openapi.json", "page.html", "LICENSE"}


@pytest.mark.parametrize(("path", "file"), [("/openapi.json", "openapi.json"), ("/", "page.html")])
def test_the_single_file_serves_what_lies_in_it(service: Service, path: str, file: str) -> None:
    assert fetch(service.port, "GET", path) == (200, (ROOT / file).read_bytes())


def test_the_single_file_accepts_a_message_and_tells_its_status(service: Service) -> None:
    status, body = fetch(service.port, "POST", "/sms", MESSAGE)
    assert status == 202
    status, body = fetch(service.port, "GET", f"/sms/{json.loads(body)['ID']}")
    assert (status, json.loads(body)) == (200, {"Status": "ACCEPTED"})


def test_the_single_file_finds_a_client_in_the_working_directory(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "shop_client.py").write_text(CLIENT)
    checked = run(sys.executable, pyz, "--client", "shop_client:factory", "--check", cwd=tmp_path)
    assert (checked.returncode, checked.stdout.splitlines()[0]) == (0, "made here")


def test_the_single_file_keeps_the_exit_code_and_names_itself(pyz: Path) -> None:
    refused = run(sys.executable, pyz, "--port", "x")
    assert (refused.returncode, refused.stderr) == (
        2, "smsproxy.pyz: error: argument --port: 'x' is not a whole number, 0 to 65535\n",
    )  # fmt: skip


def test_the_single_file_is_a_command_of_its_own(pyz: Path) -> None:
    assert os.access(pyz, os.X_OK)
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")


# The socket that outlives the process


@pytest.mark.parametrize(("direct", "db"), [(True, False), (False, True)], ids=["direct", "nginx-db"])
def test_two_restarts_under_load_fail_no_request_and_lose_no_message(direct: bool, db: bool) -> None:
    if not direct:
        tool("nginx")
    report = restarts.measure(300, math.inf, db=db, direct=direct)
    assert (report.failures, report.lost, report.doubled, report.codes) == ([], 0, 0, [0, 0, 0])


@pytest.mark.long
@pytest.mark.parametrize("db", [False, True], ids=["memory", "db"])
def test_restarts_at_a_steady_rate_fail_no_request(db: bool) -> None:
    tool("nginx")
    report = restarts.measure(3_000, 200.0, db=db)
    assert (report.failures, report.lost, report.doubled, report.codes) == ([], 0, 0, [0, 0, 0])


def test_systemd_hands_the_socket_over(tmp_path: Path) -> None:
    program = tool("systemd-socket-activate")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [program, "-l", f"127.0.0.1:{port}", *MAIN, "--port", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "Listening on" in process.stderr.readline()
        assert fetch(port, "POST", "/sms", MESSAGE)[0] == 202
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=HANG)
        assert f"listening on 127.0.0.1 port {port}" in log
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_reload_is_told_to_systemd_and_takes_the_new_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("shop the-key-of-before\n")
    with restarts.serving(tmp_path, "--api-keys-file", str(keys), command=MAIN) as service:
        keys.write_text("shop the-key-of-after\n")
        assert service.process is not None
        service.process.send_signal(signal.SIGHUP)
        service.wait_for("RELOADING=1")
        service.wait_for("READY=1")
        given = [{"Authorization": f"Bearer {key}"} for key in ("the-key-of-before", "the-key-of-after")]
        answers = [fetch(service.port, "POST", "/sms", MESSAGE, each)[0] for each in given]
    assert answers == [401, 202]


# The units


def settings(name: str) -> dict[str, str]:
    """The settings of a unit; of those given several times the last."""
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = tool("systemd-analyze")
    unit = (DEPLOY / "smsproxy.service").read_text()
    assert unit.count("ExecStart=/opt/smsproxy/bin/smsproxy ") == 1  # it must be there for the tool
    (tmp_path / "smsproxy.service").write_text(unit.replace("/opt/smsproxy/bin/smsproxy", sys.executable))
    shutil.copy(DEPLOY / "smsproxy.socket", tmp_path)
    verified = run(program, "verify", "--man=no", tmp_path / "smsproxy.service", tmp_path / "smsproxy.socket")
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_unit_fits_the_defaults_of_the_service() -> None:
    unit = settings("smsproxy.service")
    defaults = {name: default for flags in command_line.FLAGS.values() for name, _, default, _ in flags}
    assert (unit["Type"], unit["ExecReload"]) == ("notify", "/bin/kill -HUP $MAINPID")
    assert int(unit["TimeoutStopSec"]) > float(defaults["drain-timeout"] or 0) + 5
    assert int(unit["LimitNOFILE"]) > int(defaults["max-connections"] or 0) + process_control.OWN_DESCRIPTORS
    assert settings("smsproxy.socket")["ListenStream"] == f"{defaults['host']}:{defaults['port']}"


def test_systemd_never_gives_up_and_neither_does_it_hurry() -> None:
    unit = settings("smsproxy.service")
    assert (unit["StartLimitIntervalSec"], unit["Restart"]) == ("0", "on-failure")
    pause = shlex.split(unit["ExecStopPost"].replace("$$", "$"))  # as systemd reads it
    slow, quick = (run("/bin/sh", "-xc", pause[2], SERVICE_RESULT=result) for result in ("exit-code", "success"))
    assert ("+ sleep 1" in slow.stderr, "sleep" in quick.stderr) == (True, False)


def test_the_unit_starts_nothing_without_a_client() -> None:
    unit = settings("smsproxy.service")
    _, *flags = unit["ExecStart"].split()
    assert flags == ["--client", "${SMSPROXY_CLIENT}"]  # an empty word if there is no such variable: systemd.service(5)
    refused = run(*MAIN, "--client", "", "--check")
    assert (str(refused.returncode), len(refused.stderr.splitlines())) == (unit["RestartPreventExitStatus"], 1)
    assert "argument --client: must not be empty" in refused.stderr


def test_the_unit_and_the_image_use_settings_that_exist() -> None:
    text = (DEPLOY / "smsproxy.service").read_text() + (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"\bSMSPROXY_[A-Z_]+\b", text)) <= command_line.VARIABLES


# nginx

PLACES = [DEPLOY / "nginx.conf", ROOT / "postgres" / "nginx.conf"]


@pytest.fixture(scope="module", params=PLACES, ids=["deploy", "postgres"])
def front(request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an nginx before the service."""
    tool("nginx")
    with restarts.nginx(tmp_path_factory.mktemp("nginx"), service.port, request.param) as port:
        yield port


@pytest.mark.parametrize("place", PLACES, ids=["deploy", "postgres"])
def test_nginx_accepts_its_file(place: Path, tmp_path: Path) -> None:
    checked = run(tool("nginx"), "-t", "-e", tmp_path / "log", "-c", restarts.nginx_files(tmp_path, 8080, 8081, place))
    assert (checked.returncode, checked.stderr.splitlines()[-1].split()[-2:]) == (0, ["is", "successful"])


def test_nginx_keeps_one_connection_for_many_requests(front: int, service: Service) -> None:
    assert {fetch(front, "POST", "/sms", MESSAGE)[0] for _ in range(20)} == {202}
    _, metrics = fetch(service.port, "GET", "/metrics")
    assert b"\nsmsproxy_http_connections 2\n" in metrics  # nginx's and that of this request


def test_nginx_gives_a_chunked_body_a_length(front: int) -> None:
    assert fetch(front, "POST", "/sms", iter([MESSAGE.encode()]))[0] == 202  # an iterator is sent in chunks


OPERATORS = ("/", "/healthz", "/livez", "/openapi.json")  # and /metrics, which changes all the time
STRANGER = "127.0.0.2"  # an address of this machine that is in no operator's network


def test_nginx_lets_an_operator_see_everything(front: int, service: Service) -> None:
    assert [fetch(front, "GET", path) for path in OPERATORS] == [fetch(service.port, "GET", path) for path in OPERATORS]
    assert fetch(front, "GET", "/metrics")[0] == 200


def test_nginx_lets_everyone_else_see_the_messages_and_nothing_more(front: int) -> None:
    for path in (*OPERATORS, "/metrics", "//metrics", "/sms/../metrics", "/sms/%2e%2e/healthz", "/metrics?"):
        assert _refusal(front, "GET", path, source=STRANGER) == (403, None), path
    status, body = fetch(front, "POST", "/sms", MESSAGE, source=STRANGER)
    assert status == 202
    assert fetch(front, "GET", f"/sms/{json.loads(body)['ID']}", source=STRANGER)[0] == 200


def _refusal(
    port: int, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}, source: str = ""
) -> tuple[int, str | None]:
    """The status and Retry-After of an error of nginx, which must have a body as smsproxy's errors have it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        text = response.read()
    assert response.headers["Content-Type"] == "application/json"
    assert (list(json.loads(text)), text[-1:]) == (["Error"], b"\n")
    return response.status, response.headers["Retry-After"]


def test_nginx_takes_a_list_and_pushed_reports_of_a_mebibyte_from_everyone(front: int) -> None:
    body = json.dumps({"Messages": [json.loads(MESSAGE)]}).encode().ljust(1024 * 1024)
    assert fetch(front, "POST", "/sms/bulk", body, source=STRANGER)[0] == 202
    # This service has no client that takes reports, so a 404 is its own: nginx would not take so many bytes elsewhere.
    assert _refusal(front, "POST", "/reports?token=x", body, source=STRANGER) == (404, None)
    for path in ("/sms/bulk", "/reports"):
        assert _refusal(front, "POST", path, body + b" ") == (413, None)


def test_the_errors_of_nginx_are_json(front: int) -> None:
    assert _refusal(front, "GET", "/admin") == (404, None)
    assert _refusal(front, "GET", "/smsx") == (404, None)
    assert _refusal(front, "POST", "/sms", b"x" * (64 * 1024 + 1)) == (413, None)
    assert _refusal(front, "GET", "/sms/" + "x" * 70_000) == (414, None)
    assert _refusal(front, "TRACE", "/sms") == (405, None)
    assert _refusal(front, "GET", "/sms", headers={"X-Long": "x" * 70_000}) == (431, None)
    assert _refusal(front, "GET", "/sms", headers={"Host": "a b"}) == (400, None)


@pytest.mark.parametrize("place", PLACES, ids=["deploy", "postgres"])
def test_a_service_that_is_gone_or_silent_is_json_with_a_wait(place: Path, tmp_path: Path) -> None:
    tool("nginx")
    silent = socket.create_server(("127.0.0.1", 0))  # its backlog takes the connection
    upstream = silent.getsockname()[1]
    with silent, restarts.nginx(tmp_path, upstream, place, proxy_read_timeout="100ms") as port:
        assert _refusal(port, "POST", "/sms", MESSAGE) == (504, "5")
        silent.close()
        assert _refusal(port, "POST", "/sms", MESSAGE) == (502, "5")


def test_the_page_works_for_an_operator_behind_nginx(front: int, browser: Browser) -> None:
    with browser.open(f"http://127.0.0.1:{front}/") as tab:
        tab.wait('Number(document.getElementById("accepted").textContent) >= 0')
        accepted = int(tab.text("accepted"))
        tab.focus("phone")
        for text in ("48123456789", "Hi"):
            tab.type(text)
            tab.press("Tab")
        tab.press("Enter")
        tab.wait_text("test-steps", "ACCEPTED")
        tab.wait(f'Number(document.getElementById("accepted").textContent) > {accepted}')
        assert tab.complaints() == []


def test_nginx_drops_an_idle_connection_before_the_service_does() -> None:
    for place in PLACES:
        (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", place.read_text())
        assert int(seconds) < Limits().idle_timeout


def test_nginx_does_not_repeat_a_post_that_it_has_sent(tmp_path: Path) -> None:
    """The service dies with the request in hand: it may have accepted the message."""
    tool("nginx")
    received: list[bytes] = []

    def die(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    received.append(connection.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=die, args=(listener,), daemon=True)
        thread.start()
        upstream, place = listener.getsockname()[1], tmp_path / "nginx.conf.of.two"
        one = "    server 127.0.0.1:8080;\n"  # to nginx these are two, of which it could try the second
        place.write_text((DEPLOY / "nginx.conf").read_text().replace(one, f"{one}    server 127.0.0.1:{upstream};\n"))
        with restarts.nginx(tmp_path, upstream, place) as port:
            status, _ = fetch(port, "POST", "/sms", MESSAGE)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(HANG)
    assert (status, len(received)) == (502, 1)


# The image


def dockerfile(instruction: str) -> list[str]:
    """What an instruction of the Dockerfile has after it, once for each time it is there."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(instruction + " ")]


def test_the_image_has_what_the_service_needs_and_knows_whether_it_is_healthy(tmp_path: Path) -> None:
    for *sources, target in (line.split() for line in dockerfile("COPY")):
        there = tmp_path / "image" / target.lstrip("/")
        there.mkdir(parents=True)
        for source in (source for name in sources for source in ROOT.glob(name)):
            shutil.copy(source, there)
    entry = json.loads(dockerfile("ENTRYPOINT")[0])
    probe = json.loads(dockerfile("HEALTHCHECK")[0].partition("CMD ")[2])
    assert (entry[0], probe[0]) == ("python", "python")
    command = (sys.executable, str(tmp_path / "image" / entry[1].lstrip("/")))
    with restarts.serving(tmp_path, command=command) as service:
        environ = {"SMSPROXY_PORT": str(service.port)}
        assert fetch(service.port, "GET", "/openapi.json")[0] == 200
        healthy = run(sys.executable, *probe[1:], cwd=tmp_path, **environ)
        service.stop()
        service.close()
        gone = run(sys.executable, *probe[1:], cwd=tmp_path, **environ)
    assert (healthy.returncode, gone.returncode) == (0, 1)


def test_a_container_starts_nothing_without_a_client() -> None:
    (client,) = re.findall(r"SMSPROXY_CLIENT=(\S+)", " ".join(dockerfile("ENV")))
    refused = run(*MAIN, "--check", SMSPROXY_CLIENT=client)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "argument --client" in refused.stderr
    named = run(*MAIN, "--check", SMSPROXY_CLIENT="fastsmsing:InMemoryClient")
    assert named.returncode == 0
    assert re.search(r"SMSPROXY_CLIENT: \$\{SMSPROXY_CLIENT:\?", (ROOT / "postgres" / "compose.yaml").read_text())


def test_docker_sees_what_the_image_copies_and_nothing_else() -> None:
    first, *others = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = [source for line in dockerfile("COPY") for source in line.split()[:-1]]
    assert (first, sorted(others)) == ("*", sorted(f"!{source}" for source in copied))


def test_the_compose_file_has_the_version_of_postgresql_that_was_tried() -> None:
    compose, readme = ((ROOT / "postgres" / name).read_text() for name in ("compose.yaml", "README.md"))
    assert re.findall(r"image: postgres:(\d+)", compose) == re.findall(r"documentation, tested with (\d+)\.", readme)


def test_the_image_does_not_run_as_root_and_keeps_its_data_in_a_volume() -> None:
    (database,) = re.findall(r"SMSPROXY_DB=(\S+)", dockerfile("ENV")[0])
    assert int(dockerfile("USER")[-1]) > 0
    assert Path(database).parent == Path(dockerfile("VOLUME")[0])


# Kubernetes


@pytest.fixture(scope="module")
def objects() -> Mapping[str, Any]:
    """What kubernetes.yaml makes, by kind."""
    yaml = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_kubernetes_objects_fit_the_schemas(objects: Mapping[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    assert objects.keys() == {"Secret", "Deployment", "Service", "PodDisruptionBudget"}
    for version in ("1.30", "1.34"):  # the first that knows the sleep of preStop, and one that has it for good
        for each in objects.values():
            validate(each, version, strict=True)


def test_the_kubernetes_objects_fit_each_other_and_the_service(objects: Mapping[str, Any]) -> None:
    deployment = objects["Deployment"]["spec"]
    pod, (container,) = deployment["template"]["spec"], deployment["template"]["spec"]["containers"]
    labels = deployment["template"]["metadata"]["labels"].items()
    selectors = (objects["Service"]["spec"]["selector"], deployment["selector"]["matchLabels"],
                 objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])  # fmt: skip
    assert all(selector.items() <= labels for selector in selectors)
    assert deployment["replicas"] > objects["PodDisruptionBudget"]["spec"]["minAvailable"] >= 1
    assert container["envFrom"] == [{"secretRef": {"name": objects["Secret"]["metadata"]["name"]}}]
    assert [port["targetPort"] for port in objects["Service"]["spec"]["ports"]] == [container["ports"][0]["name"]]
    assert f"SMSPROXY_PORT={container['ports'][0]['containerPort']}" in " ".join(dockerfile("ENV"))
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/livez", "liveness": "/livez", "readiness": "/healthz"}
    assert str(pod["securityContext"]["runAsUser"]) == dockerfile("USER")[-1]
    assert (pod["enableServiceLinks"], container["securityContext"]["readOnlyRootFilesystem"]) == (False, True)
    assert container["image"].endswith(f":{command_line.__version__}")
    defaults = {name: default for flags in command_line.FLAGS.values() for name, _, default, _ in flags}
    ending = container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(defaults["drain-timeout"] or 0)
    assert pod["terminationGracePeriodSeconds"] > ending + 5


def test_the_kubernetes_settings_start_nothing_until_the_secret_is_filled_in(objects: Mapping[str, Any]) -> None:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    secret = objects["Secret"]["stringData"]
    assert {each["name"] for each in container["env"]} | secret.keys() <= command_line.VARIABLES | {"PGPASSWORD"}
    refused = run(*MAIN, "--check", **secret)
    assert (refused.returncode, refused.stderr) == (
        2, "main.py: error: environment variable SMSPROXY_API_KEYS is empty; unset it for the default\n",
    )  # fmt: skip


# Alerts and the dashboard


def expressions() -> list[str]:
    """All PromQL of the dashboard, Grafana's variables replaced."""
    doc = json.loads((DEPLOY / "grafana.json").read_text())
    found = [target["expr"] for panel in doc["panels"] for target in panel.get("targets", ())]
    found += [each["expr"] for each in doc["annotations"]["list"]]
    assert [each for each in found if each.count("{") != each.count('{job="$job", instance=~"$instance"')] == []
    found = [each.replace("$job", "smsproxy").replace("$instance", ".*") for each in found]
    return [re.sub(r"\$(__rate_interval|__range)", "5m", each) for each in found]


def test_promtool_accepts_the_alerts_and_their_tests() -> None:
    program = tool("promtool")
    checked = run(program, "check", "rules", DEPLOY / "alerts.yaml")
    assert (checked.returncode, "SUCCESS" in checked.stdout) == (0, True), checked.stderr
    tested = run(program, "test", "rules", DEPLOY / "alerts_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_test() -> None:
    alerts = re.findall(r"- alert: (\w+)", (DEPLOY / "alerts.yaml").read_text())
    tests = (DEPLOY / "alerts_test.yaml").read_text()
    fire = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:", tests))
    assert len(alerts) > 5
    assert fire == set(alerts)


def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": expression} for number, expression in enumerate(expressions())]
    document = {"groups": [{"name": "dashboard", "rules": rules}]}
    (tmp_path / "rules.yaml").write_text(json.dumps(document))  # JSON is YAML
    checked = run(tool("promtool"), "check", "rules", tmp_path / "rules.yaml")
    assert (checked.returncode, f"{len(rules)} rules found" in checked.stdout) == (0, True), checked.stderr


def test_promtool_accepts_the_metrics(service: Service) -> None:
    _, metrics = fetch(service.port, "GET", "/metrics")
    checked = subprocess.run([tool("promtool"), "check", "metrics"], input=metrics, capture_output=True, timeout=HANG)
    assert (checked.returncode, checked.stderr.decode()) == (0, "")


def test_the_dashboard_is_whole() -> None:
    doc = json.loads((DEPLOY / "grafana.json").read_text())
    panels = doc["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {variable["name"] for variable in doc["templating"]["list"]} == {"datasource", "job", "instance"}
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["targets"] for panel in panels if panel["type"] != "row")


def _watched() -> Sequence[str]:
    rules = (DEPLOY / "alerts.yaml").read_text(), (DEPLOY / "alerts_test.yaml").read_text()
    return [*rules, *expressions(), json.dumps(json.loads((DEPLOY / "grafana.json").read_text())["templating"])]


def test_what_is_watched_exists_from_the_start(service: Service) -> None:
    metrics = fetch(service.port, "GET", "/metrics")[1].decode()
    names = set(re.findall(r"^([a-z_]+)", metrics, re.M))
    text = "\n".join(_watched())
    used = set(re.findall(r"\b(?:smsproxy|process)_[a-z_]+\b", text))
    assert len(used) > 15
    ages = {metric.name for metric in vars(Metrics()).values() if isinstance(metric, Age)}  # of what has yet to happen
    assert used - names - ages == set()
    labels = set(re.findall(r"\b(smsproxy_[a-z_]+)\{[^}]*\b(reason|status|result|route|le)=\"([\w./]+)\"", text))
    missing = [each for each in labels if not re.search(r'^{}\{{[^}}]*\b{}="{}"'.format(*each), metrics, re.M)]
    assert (len(labels) > 4, missing) == (True, [])
