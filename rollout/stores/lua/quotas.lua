-- One worker's report on the keys in use, and what it may spend of their limits until the next.
--
-- Of a limit a minute there are never more credits than the limit: those that workers hold, and
-- those in `level`, which refills with time. A report says what was spent of the credits, gives
-- back what is more than the worker's share, and gets what is missing to it. Of concurrency each
-- worker holds slots. A worker that is silent loses its share, and its credits are not given to
-- others, for it may have spent them: time brings them back.
--
-- Where nobody reports of a key in use, the ledger itself was out of reach. Nobody's silence counts
-- then, and what refilled meanwhile is not in the level but `owed`: the workers have given it to
-- themselves, and whoever is the first to come back must not be given what another has spent.
--
-- KEYS: live gateways, active keys (sorted sets by expiry in ms), tokens of the month (hash: key),
--       the same by worker (hash: `key|incarnation`), then for each key of the report a hash:
--       `LIMIT:level`, `LIMIT:owed`, `LIMIT:at` (ms),
--       `LIMIT|incarnation` -> "spent credit demand expiry count".
-- ARGV: incarnation, the report (JSON), ms that a silent worker keeps its share, ms that a key
--       stays active, seconds to keep the month, how many active keys to name, ms after which a
--       worker that hears nothing refills its share by itself.
-- Returns {workers, {a grant (JSON) for each key}, {active keys}}.
local me, reports = ARGV[1], cjson.decode(ARGV[2])
local patience, active_for, keep_month = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local refills_after = tonumber(ARGV[7])
local reserve = 0.1 -- of a limit, shared evenly by all workers, so that each may always begin
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local live = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')
local known = false
for _, worker in ipairs(live) do known = known or worker == me end
if not known then
  -- It has not said yet that it lives, and must be counted before it admits anything.
  live[#live + 1] = me
  redis.call('ZADD', KEYS[1], now + patience, me)
end
local workers = #live

-- The entries of a limit by worker; those of the silent, as of then, are left out and removed.
local function read(fields, name, as_of)
  local entries, gone = {}, {}
  for field, text in pairs(fields) do
    if string.sub(field, 1, #name + 1) == name .. '|' then
      local spent, credit, demand, expiry, count =
        string.match(text, '^(%S+) (%S+) (%S+) (%S+) ?(%S*)$')
      if tonumber(expiry) > as_of then
        entries[string.sub(field, #name + 2)] = {
          spent = tonumber(spent), credit = tonumber(credit), demand = tonumber(demand),
          count = tonumber(count) or 0,
        }
      else
        gone[#gone + 1] = field
      end
    end
  end
  return entries, gone
end

local function settle(key, fields, report, count, active_until)
  local name, maximum = report.limit, report.maximum
  local level, at = tonumber(fields[name .. ':level']), tonumber(fields[name .. ':at'])
  local owed = tonumber(fields[name .. ':owed']) or 0
  local absent = at ~= nil and now - at > refills_after and active_until > at
  local entries, gone = read(fields, name, absent and at or now)
  local writes = {}
  local function put(worker, entry)
    writes[#writes + 1] = name .. '|' .. worker
    writes[#writes + 1] = string.format('%s %.3f %.3f %d %d', entry.spent or '-', entry.credit,
      entry.demand, now + patience, entry.count or 0)
  end
  if not level then
    -- The first report: until then each worker could begin with an even part.
    level, at = maximum, now
    for _, worker in ipairs(live) do
      entries[worker] = { credit = math.floor(maximum / workers), demand = 0 }
      level = level - entries[worker].credit
      put(worker, entries[worker])
    end
  end
  local mine = entries[me] or { credit = 0 }
  -- A worker that lost count of the key, or was told other limits, begins at nothing again.
  if mine.count ~= count then mine.spent = nil end
  local held, demand, others = 0, report.demand, 0
  for worker, entry in pairs(entries) do
    if worker ~= me then
      held = held + math.max(entry.credit, 0)
      demand = demand + entry.demand
      others = others + 1
      if absent then put(worker, entry) end
    end
  end
  local workers = math.max(workers, others + 1)
  local part = demand > 0 and report.demand / demand or 1 / workers
  local share = maximum * (reserve / workers + (1 - reserve) * part)
  -- Whoever asks for nothing lets go of the last one too, or a limit of 1 would never move.
  local hold = report.demand > 0 and math.ceil(share) or math.floor(share)
  if name == 'concurrency' then
    mine.credit = math.max(report.spent, math.min(hold, maximum - held))
  else
    local all = held + math.max(mine.credit, 0)
    local since = now - at
    if absent then
      owed = maximum * (since - refills_after) / 60000
      since = refills_after
    end
    level = level + maximum * since / 60000
    -- What a worker gave itself while only it was cut off is a part of what the others were given.
    -- It never makes a debt: of a long time only the last minute is still in the level.
    local own = math.min(report.refilled, owed)
    owed = owed - own
    level = math.max(math.min(level, 0), level - (report.refilled - own))
    level = math.min(maximum - all, level)
    mine.credit = mine.credit - (report.spent - (mine.spent or report.acknowledged))
    if mine.credit < 0 then
      -- What was spent without credit is everyone's debt.
      level = level + mine.credit
      mine.credit = 0
    end
    if mine.credit > hold then
      level = math.min(maximum - held - hold, level + mine.credit - hold)
      mine.credit = hold
    else
      -- Not all that there is, for the next to report wants its part.
      local fair = math.max(1, math.floor(level * share / maximum))
      local given = math.max(0, math.floor(math.min(hold - mine.credit, fair, level)))
      level = level - given
      mine.credit = mine.credit + given
    end
  end
  mine.spent, mine.demand = string.format('%.3f', report.spent), report.demand
  mine.count = count
  put(me, mine)
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
  redis.call('HSET', key, name .. ':level', string.format('%.6f', level),
    name .. ':owed', string.format('%.6f', owed), name .. ':at', now, unpack(writes))
  redis.call('PEXPIRE', key, 60 * active_for)
  local elsewhere = name == 'concurrency' and maximum - held - mine.credit or level + held
  return { credit = mine.credit, share = math.max(share, mine.credit), elsewhere = elsewhere }
end

local function count(id, tokens)
  local field = id .. '|' .. me
  local fresh = tokens - tonumber(redis.call('HGET', KEYS[4], field) or 0)
  if fresh ~= 0 then
    redis.call('HSET', KEYS[4], field, string.format('%d', tokens))
    redis.call('HINCRBY', KEYS[3], id, string.format('%d', fresh))
    redis.call('EXPIRE', KEYS[3], keep_month)
    redis.call('EXPIRE', KEYS[4], keep_month)
  end
  return tonumber(redis.call('HGET', KEYS[3], id) or 0), fresh ~= 0
end

local grants = {}
for i, report in ipairs(reports) do
  local key, fields = KEYS[4 + i], {}
  local flat = redis.call('HGETALL', key)
  for f = 1, #flat, 2 do fields[flat[f]] = flat[f + 1] end
  local tokens, wanted = count(report.id, report.tokens)
  local active_until = tonumber(redis.call('ZSCORE', KEYS[2], report.id) or 0)
  local grant = { tokens = tokens }
  for _, limit in ipairs(report.limits) do
    grant.limits = grant.limits or {}
    grant.limits[limit.limit] = settle(key, fields, limit, report.count, active_until)
    wanted = wanted or limit.demand > 0
  end
  if wanted then redis.call('ZADD', KEYS[2], now + active_for, report.id) end
  grants[i] = cjson.encode(grant)
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return { workers, grants, redis.call('ZREVRANGE', KEYS[2], 0, ARGV[6] - 1) }
