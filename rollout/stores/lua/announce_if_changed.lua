-- Set fields of a hash; increment the revision and announce it only if one of them changed.
-- KEYS: hash, revision.  ARGV: channel, then field, value pairs.  Returns the revision.
local changed = false
for i = 2, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    changed = true
  end
end
if not changed then return tonumber(redis.call('GET', KEYS[2]) or '0') end
local revision = redis.call('INCR', KEYS[2])
redis.call('PUBLISH', ARGV[1], revision)
return revision
