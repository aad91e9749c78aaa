-- Put a leased case back.  KEYS: cases (hash), open, leased (sorted sets), leases (hash).
-- ARGV: case id, labeler.  Returns 1, or 0 when this labeler does not hold it.
if redis.call('HGET', KEYS[4], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[2], cjson.decode(redis.call('HGET', KEYS[1], ARGV[1])).priority, ARGV[1])
return 1
