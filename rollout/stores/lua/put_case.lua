-- Add a decided case with its labels; one that is there is left alone.
-- KEYS: cases, labels (hashes), labelled, created (sorted sets), tallies (hash).
-- ARGV: case id, case, labels, decided at (ms), created at (ms); then names of tallies, each
--       followed by its change.
-- Returns 1, or 0 where the case was there.
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[1])
for place = 6, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[5], ARGV[place], ARGV[place + 1])
end
return 1
