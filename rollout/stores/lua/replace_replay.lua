-- Replace a replay that is still as the caller knows it; one that has ended leaves the queue.
-- KEYS: replays (hash), queued (sorted set).  ARGV: id, before, after, 1 if it has ended.
-- Returns whether it was replaced.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
if ARGV[4] == '1' then redis.call('ZREM', KEYS[2], ARGV[1]) end
return 1
