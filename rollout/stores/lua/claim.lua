-- Lease the cases of highest priority to a labeler, after giving expired leases back.
-- Cases that this labeler has labelled already are for others.
-- KEYS: cases (hash), open, leased (sorted sets), leases, labels (hashes).
-- ARGV: labeler, count, milliseconds of the lease, the labeler as a field of a label's JSON.
-- Returns the cases.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('ZREM', KEYS[3], id)
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZADD', KEYS[2], cjson.decode(redis.call('HGET', KEYS[1], id)).priority, id)
end
local wanted, chosen, offset = tonumber(ARGV[2]), {}, 0
while #chosen < wanted do
  local ids = redis.call('ZREVRANGE', KEYS[2], offset, offset + 99)
  if #ids == 0 then break end
  local labels = redis.call('HMGET', KEYS[5], unpack(ids))
  for place, id in ipairs(ids) do
    -- A quote within a text is escaped, so the field is never found in what somebody wrote.
    local own = labels[place] and string.find(labels[place], ARGV[4], 1, true)
    if not own and #chosen < wanted then chosen[#chosen + 1] = id end
  end
  offset = offset + #ids
end
local claimed = {}
for _, id in ipairs(chosen) do
  redis.call('ZREM', KEYS[2], id)
  redis.call('ZADD', KEYS[3], now + ARGV[3], id)
  redis.call('HSET', KEYS[4], id, ARGV[1])
  claimed[#claimed + 1] = redis.call('HGET', KEYS[1], id)
end
return claimed
