-- Keep what a caller said of a request; the first word stands.
-- KEYS: feedback (hash).  ARGV: field, Feedback, the most that are kept, seconds to keep them.
-- Returns 1, 0 where there is one already, or -1 where there is no room.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
