-- Replace a rollout if nobody else has: state, history, audit and announcement in one step.
-- KEYS: rollouts (hash), history (stream), audit (stream), revision (integer).
-- ARGV: route, revision expected, new rollout, history entry, audit entry, channel.
-- Returns the catalog's new revision, -1 when stale, -2 when there is no such route.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored then return -2 end
-- The same commit again, after its answer was lost on the way.
if stored == ARGV[3] then return tonumber(redis.call('GET', KEYS[4])) end
if cjson.decode(stored).revision ~= tonumber(ARGV[2]) then
  -- Or that one again, and somebody else has gone on from it meanwhile.
  for _, row in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 20)) do
    if row[2][2] == ARGV[4] then return tonumber(redis.call('GET', KEYS[4])) end
  end
  return -1
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', '10000', '*', 'entry', ARGV[4])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', '100000', '*', 'entry', ARGV[5])
local revision = redis.call('INCR', KEYS[4])
redis.call('PUBLISH', ARGV[6], revision)
return revision
