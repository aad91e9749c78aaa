-- Create a route with its first version and rollout, or update its configuration.
-- KEYS: routes, rollouts, versions, version-numbers (hashes), audit (stream), revision (integer).
-- ARGV: route name, route, first rollout, first version, audit entry, channel.
-- Returns 1 when created, 0 when updated, -1 when nothing changed.
local before = redis.call('HGET', KEYS[1], ARGV[1])
if before == ARGV[2] then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local created = redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[3])
if created == 1 then
  redis.call('HSET', KEYS[3], ARGV[1] .. '@1', ARGV[4])
  redis.call('HSET', KEYS[4], ARGV[1], 1)
end
-- All in an entry are texts, so it survives the way through a table as it is.
local entry = cjson.decode(ARGV[5])
entry.before = before or cjson.null
redis.call('XADD', KEYS[5], 'MAXLEN', '~', '100000', '*', 'entry', cjson.encode(entry))
redis.call('PUBLISH', ARGV[6], redis.call('INCR', KEYS[6]))
return created
