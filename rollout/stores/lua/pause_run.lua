-- Ask a run to pause; one that waits in the queue is paused here.
-- KEYS: runs (hash), queued (sorted set), paused (set), leased (sorted set).
-- ARGV: run id, the paused run.  Returns 1 paused, 2 asked, 0 it has ended.
local queued = redis.call('ZREM', KEYS[2], ARGV[1]) == 1
local paused = redis.call('SISMEMBER', KEYS[3], ARGV[1]) == 1
if not queued and not paused and not redis.call('ZSCORE', KEYS[4], ARGV[1]) then return 0 end
redis.call('SADD', KEYS[3], ARGV[1])
if not queued then return 2 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
