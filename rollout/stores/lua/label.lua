-- Record a label and count what it decides; a second label changes nothing.
-- KEYS: cases, labels, leases (hashes), open, leased, waiting, labelled (sorted sets),
--       pairs (hash).
-- ARGV: case id, label, labeler, labelled at (ms), field to count ('' for none).
-- Returns 1 recorded, 0 labelled before, 2 the very same label again, -1 no such case,
--         -2 leased by another.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return -1 end
local before = redis.call('HGET', KEYS[2], ARGV[1])
if before then return before == ARGV[2] and 2 or 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = tonumber(redis.call('ZSCORE', KEYS[5], ARGV[1]) or 0)
if expiry > now and redis.call('HGET', KEYS[3], ARGV[1]) ~= ARGV[3] then return -2 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('ZREM', KEYS[6], ARGV[1])
redis.call('ZADD', KEYS[7], ARGV[4], ARGV[1])
if ARGV[5] ~= '' then redis.call('HINCRBY', KEYS[8], ARGV[5], 1) end
return 1
