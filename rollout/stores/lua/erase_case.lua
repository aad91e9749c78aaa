-- Erase a case with its labels and take it out of the tallies.
-- KEYS: cases, labels, leases (hashes), open, leased, waiting, labelled, disputed, created (sorted
--       sets), tallies, prompts (hashes).
-- ARGV: case id, the labels from which the caller knows the tallies, digest of the prompt; then
--       names of tallies, each followed by its change.
-- Returns 1, 0 where there is no such case, -3 where it was labelled meanwhile.
local id = ARGV[1]
if redis.call('HEXISTS', KEYS[1], id) == 0 then return 0 end
if (redis.call('HGET', KEYS[2], id) or '') ~= ARGV[2] then return -3 end
for place = 1, 3 do redis.call('HDEL', KEYS[place], id) end
for place = 4, 9 do redis.call('ZREM', KEYS[place], id) end
if redis.call('HGET', KEYS[11], ARGV[3]) == id then redis.call('HDEL', KEYS[11], ARGV[3]) end
for place = 4, #ARGV, 2 do
  if redis.call('HINCRBY', KEYS[10], ARGV[place], ARGV[place + 1]) <= 0 then
    redis.call('HDEL', KEYS[10], ARGV[place])
  end
end
return 1
