-- Read a piece of a hash for the fields whose value holds a text, without sending the others.
-- KEYS: the hash.  ARGV: cursor, about how many fields to look at, the text.
-- Returns {the next cursor, '0' at the end; the fields}.
local answer = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local found = {}
for place = 1, #answer[2], 2 do
  if string.find(answer[2][place + 1], ARGV[3], 1, true) then
    found[#found + 1] = answer[2][place]
  end
end
return {answer[1], found}
