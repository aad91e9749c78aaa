-- Store a run if its trainer still holds it.
-- KEYS: runs (hash), queued, leased (sorted sets), fences (hash).
-- ARGV: run id, fence, run, what becomes of the lease: 'keep', 'end' or 'queue', created (ms).
-- Returns 1, or 0 when another trainer has it.
if redis.call('HGET', KEYS[4], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
if ARGV[4] ~= 'keep' then redis.call('ZREM', KEYS[3], ARGV[1]) end
if ARGV[4] == 'queue' then redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1]) end
return 1
