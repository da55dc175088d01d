-- What is done to one session in Redis: each call is one operation, whole or not at all.
--
-- KEYS[1]  the session, a hash:
--   r  revision: how often it was saved          n  nonce of that save, by which histories that parted are told apart
--   d  the record (record.py)                    t  milliseconds that it lives after its last use
--   x  when it expires, if nobody has leased it  l  token of the lease   u  until when that is good   w  another wants it
-- ARGV     operation, now, then what the operation needs. Times are milliseconds since 1970; now '': the server's clock.
-- Answers  a word, and what belongs to it.
local key, op, now = KEYS[1], ARGV[1], tonumber(ARGV[2])
local REMEMBERED_MS = 600000 -- so long an expired one is known to have been there

if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local found = redis.call('HMGET', key, 'r', 'n', 't', 'x', 'l', 'u', 'w')
local revision, nonce, ttl, expires = tonumber(found[1]), found[2], tonumber(found[3]), tonumber(found[4])
local holder, is_leased = found[5], found[5] and tonumber(found[6]) > now
local is_gone = revision and not is_leased and expires <= now

local function whole(number) return string.format('%.0f', number) end

local function live_on(ms) -- from now on for so long
  expires = now + ms
  redis.call('HSET', key, 'x', whole(expires), 't', whole(ms))
  redis.call('PEXPIRE', key, whole(ms + REMEMBERED_MS))
end

local function write(new_revision, new_nonce, record, ms)
  redis.call('HSET', key, 'r', whole(new_revision), 'n', new_nonce, 'd', record)
  live_on(ms)
end

local function reserve(token, ms)
  redis.call('HSET', key, 'l', token, 'u', whole(now + ms))
  redis.call('HDEL', key, 'w')
  live_on(ttl)
end

local function free()
  redis.call('HDEL', key, 'l', 'u', 'w')
  live_on(ttl)
end

-- Why it can't be had by one who has seen a revision of it; nil if it can.
local function refusal(seen_revision, seen_nonce)
  if not revision then return 'none' end
  if is_gone then return 'gone' end
  if seen_revision and (revision < seen_revision or (revision == seen_revision and nonce ~= seen_nonce)) then
    return 'lost'
  end
end

local function tell(seen_nonce) -- the record, to one who doesn't have it
  local facts = {'ok', whole(revision), nonce, whole(expires)}
  if nonce ~= seen_nonce then facts[5] = redis.call('HGET', key, 'd') end
  return facts
end

local operations = {}

function operations.create(new_nonce, record, ms)
  if revision and not is_gone and nonce ~= new_nonce then return {'exists'} end
  redis.call('DEL', key)
  write(1, new_nonce, record, tonumber(ms))
  return {'ok', whole(expires)}
end

function operations.load(seen_revision, seen_nonce)
  local refused = refusal(tonumber(seen_revision), seen_nonce)
  return refused and {refused} or tell(seen_nonce)
end

function operations.lease(seen_revision, seen_nonce, token, ms, wanted)
  local refused = refusal(tonumber(seen_revision), seen_nonce)
  if refused then return {refused} end
  if is_leased and holder ~= token then
    if wanted == '1' then redis.call('HSET', key, 'w', '1') end
    return {'busy'}
  end
  reserve(token, tonumber(ms))
  return tell(seen_nonce)
end

function operations.save(token, expected, new_nonce, record, ms, lease_ms)
  if revision and nonce == new_nonce then return {'ok', whole(revision), whole(expires)} end -- the answer got lost
  if not revision or holder ~= token or revision ~= tonumber(expected) then return {'conflict'} end
  ttl = tonumber(ms)
  write(revision + 1, new_nonce, record, ttl)
  if lease_ms == '' then free() else reserve(token, tonumber(lease_ms)) end
  return {'ok', whole(revision + 1), whole(expires)}
end

-- A lease that nobody else has taken is good again, even if it had run out; again: also one that the server has lost.
function operations.renew(token, expected, ms, again)
  local is_free = again == '1' and not is_leased and revision == tonumber(expected)
  if not revision or (holder ~= token and not is_free) then return {'lost'} end
  local wanted = found[7]
  reserve(token, tonumber(ms))
  return {wanted and 'wanted' or 'ok'}
end

function operations.release(token)
  if revision and holder == token then free() end
  return {'ok'}
end

function operations.delete(token)
  if revision and holder ~= token then return {'conflict'} end
  redis.call('DEL', key)
  return {'ok'}
end

-- After a restart that lost the last writes: put back what was saved, unless somebody went on from it.
function operations.restore(lost_revision, lost_nonce, record, ms)
  if revision and revision >= tonumber(lost_revision) then return {'there'} end
  write(tonumber(lost_revision), lost_nonce, record, tonumber(ms))
  return {'ok'}
end

-- The same for what was deleted, or is no longer known: an older revision must not come back.
function operations.drop(lost_revision)
  if not revision or revision > tonumber(lost_revision) then return {'there'} end
  redis.call('DEL', key)
  return {'ok'}
end

return operations[op](unpack(ARGV, 3))
