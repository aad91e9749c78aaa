-- Ask a run to stop; one that waits in the queue, or is paused, is ended here.
-- KEYS: runs (hash), queued (sorted set), cancelled, paused (sets), leased (sorted set).
-- ARGV: run id, the cancelled run.  Returns 1 ended, 2 asked, 0 no such run.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SADD', KEYS[3], ARGV[1])
local paused = redis.call('SREM', KEYS[4], ARGV[1]) == 1
local leased = redis.call('ZSCORE', KEYS[5], ARGV[1])
if redis.call('ZREM', KEYS[2], ARGV[1]) == 0 and (leased or not paused) then return 2 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
