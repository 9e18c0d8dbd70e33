"""aiohttp's own server."""
from __future__ import annotations

import sys

from aiohttp import web

import peer_store

routes = web.RouteTableDef()


@routes.post("/sms")
async def post(request: web.Request) -> web.Response:
    """Accepts a message."""
    try:
        document = await request.json()
        good = peer_store.valid(document["PhoneNumber"], document["Content"])
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        return web.json_response({"Error": "not a message"}, status=400)
    return web.json_response({"ID": peer_store.accept()}, status=202)


@routes.get("/sms/{message_id}")
async def get(request: web.Request) -> web.Response:
    """Tells a status."""
    return web.json_response({"Status": peer_store.statuses.get(request.match_info["message_id"], "NOT_FOUND")})


app = web.Application()
app.add_routes(routes)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, backlog=2048)
