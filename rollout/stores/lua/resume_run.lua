-- Let a paused run wait for a trainer, or take back that it should pause.
-- KEYS: runs (hash), queued (sorted set), paused (set), leased (sorted set).
-- ARGV: run id, the queued run, created (ms).  Returns 1 queued, 2 taken back, 0 it is not paused.
if redis.call('SREM', KEYS[3], ARGV[1]) == 0 then return 0 end
if redis.call('ZSCORE', KEYS[4], ARGV[1]) then return 2 end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
