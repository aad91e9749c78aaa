-- Append a label and, where it decides the case, move the case and count what that decides.
-- KEYS: cases, labels, leases (hashes), open, leased, waiting, labelled, disputed (sorted sets),
--       pairs, tallies (hashes).
-- ARGV: case id, label, labeler, the labeler as a field of a label's JSON, the labels from which
--       the caller decided, labelled at (ms), the state that follows (open, labelled, disputed),
--       priority, field of pairs to count ('' for none), seconds to keep the pairs; then names of
--       tallies, each followed by its change.
-- Returns 1 recorded, 0 decided before or labelled by this labeler before, 2 the very same label
--         again, -1 no such case, -2 leased by another, -3 labelled by somebody meanwhile.
local id = ARGV[1]
if redis.call('HEXISTS', KEYS[1], id) == 0 then return -1 end
local before = redis.call('HGET', KEYS[2], id) or ''
for line in string.gmatch(before, '[^\n]+') do
  if line == ARGV[2] then return 2 end
end
if string.find(before, ARGV[4], 1, true) then return 0 end
if redis.call('ZSCORE', KEYS[7], id) or redis.call('ZSCORE', KEYS[8], id) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = tonumber(redis.call('ZSCORE', KEYS[5], id) or 0)
if expiry > now and redis.call('HGET', KEYS[3], id) ~= ARGV[3] then return -2 end
if before ~= ARGV[5] then return -3 end
redis.call('HSET', KEYS[2], id, before == '' and ARGV[2] or before .. '\n' .. ARGV[2])
redis.call('HDEL', KEYS[3], id)
redis.call('ZREM', KEYS[5], id)
if ARGV[7] == 'open' then
  redis.call('ZADD', KEYS[4], ARGV[8], id)
else
  redis.call('ZREM', KEYS[4], id)
  redis.call('ZREM', KEYS[6], id)
  redis.call('ZADD', ARGV[7] == 'labelled' and KEYS[7] or KEYS[8], ARGV[6], id)
end
if ARGV[9] ~= '' then
  redis.call('HINCRBY', KEYS[9], ARGV[9], 1)
  redis.call('EXPIRE', KEYS[9], ARGV[10])
end
for place = 11, #ARGV, 2 do
  if redis.call('HINCRBY', KEYS[10], ARGV[place], ARGV[place + 1]) <= 0 then
    redis.call('HDEL', KEYS[10], ARGV[place])
  end
end
return 1
