-- Remove fields of a hash; increment the revision and announce it only if one of them was there.
-- KEYS: hash, revision.  ARGV: channel, then fields.  Returns the revision.
local gone = 0
for i = 2, #ARGV do
  gone = gone + redis.call('HDEL', KEYS[1], ARGV[i])
end
if gone == 0 then return tonumber(redis.call('GET', KEYS[2]) or '0') end
local revision = redis.call('INCR', KEYS[2])
redis.call('PUBLISH', ARGV[1], revision)
return revision
