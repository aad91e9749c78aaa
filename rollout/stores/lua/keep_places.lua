-- Keep where prompts were put; what was put somewhere once stays there.
-- KEYS: anchors (hash).  ARGV: digests, each followed by its anchor.
for place = 1, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[place], ARGV[place + 1])
end
