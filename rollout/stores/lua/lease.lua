-- Acquire or renew a lease.  KEYS: lease (string), fence (integer).
-- ARGV: holder, milliseconds, 'acquire' or 'renew'.
-- Returns the fencing token of the holder, or -1 when somebody else has it.
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(redis.call('GET', KEYS[2]))
end
if holder or ARGV[3] == 'renew' then return -1 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return redis.call('INCR', KEYS[2])
