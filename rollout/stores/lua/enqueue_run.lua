-- Put a run into the queue unless another one of its route has not ended yet.
-- KEYS: runs (hash), queued, leased (sorted sets), paused (set).
-- ARGV: run id, run, created (ms), route.  Returns 1, or 0 where there is another one.
local ids = {}
for _, key in ipairs({KEYS[2], KEYS[3]}) do
  for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do ids[#ids + 1] = id end
end
for _, id in ipairs(redis.call('SMEMBERS', KEYS[4])) do ids[#ids + 1] = id end
for _, id in ipairs(ids) do
  local text = redis.call('HGET', KEYS[1], id)
  if text and cjson.decode(text).route == ARGV[4] then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
return 1
