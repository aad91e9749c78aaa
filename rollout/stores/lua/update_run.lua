-- Store a run if its trainer still holds it.
-- KEYS: runs (hash), queued, leased (sorted sets), fences (hash), paused (set).
-- ARGV: run id, fence, run, what becomes of the lease: 'keep', 'end', 'pause' or 'queue',
--       created (ms), the run as it is when it is queued.
-- Returns 1, or 0 when another trainer has it.
if redis.call('HGET', KEYS[4], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
if ARGV[4] ~= 'keep' then redis.call('ZREM', KEYS[3], ARGV[1]) end
-- Somebody may have let a run go on that was about to pause: then it waits for a trainer at once.
local resumed = ARGV[4] == 'pause' and redis.call('SISMEMBER', KEYS[5], ARGV[1]) == 0
if resumed then redis.call('HSET', KEYS[1], ARGV[1], ARGV[6]) end
if ARGV[4] == 'queue' or resumed then redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1]) end
if ARGV[4] == 'end' then redis.call('SREM', KEYS[5], ARGV[1]) end
return 1
