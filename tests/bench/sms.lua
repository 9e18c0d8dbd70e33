-- wrk ... -- METHOD keep|close ID...; the report is one line of JSON.
local requests, turn = {}, 0

function init(args)
  local close = args[2] == "close"
  wrk.headers["Content-Type"] = "application/json"
  if close then wrk.headers["Connection"] = "close" end
  if args[1] == "post" then
    requests[1] = wrk.format("POST", "/sms", nil, '{"PhoneNumber": "48123456789", "Content": "Your parcel is here"}')
  else
    wrk.headers["Content-Type"] = nil
    for i = 3, #args do requests[i - 2] = wrk.format("GET", "/sms/" .. args[i]) end
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local report = { requests = summary.requests, microseconds = summary.duration,
                   p50 = latency:percentile(50), p99 = latency:percentile(99) }
  for kind, count in pairs(summary.errors) do report[kind] = count end
  local fields = {}
  for name, value in pairs(report) do fields[#fields + 1] = string.format('"%s": %d', name, value) end
  io.write("{" .. table.concat(fields, ", ") .. "}\n")
end
