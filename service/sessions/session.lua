-- What is done to one session in Redis: each call is one operation, whole or not at all.
--
-- KEYS[1]  the session, a hash:
--   r  revision: how often it was saved          n  nonce of that save, by which histories that parted are told apart
--   b  birth: when it was created, and a nonce   d  the record (record.py)
--   t  milliseconds that it lives after its last use
--   x  when it expires, if nobody has leased it  l  token of the lease  u  until when it is good  w  1: it is wanted
-- ARGV     operation, now, then what the operation needs. Times are milliseconds since 1970; now '': the server's clock.
-- Answers  a word, and what belongs to it.
local key, op, now = KEYS[1], ARGV[1], tonumber(ARGV[2])
local REMEMBERED_MS = 600000 -- so long an expired one is known to have been there

local time = redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local found = redis.call('HMGET', key, 'r', 'n', 't', 'x', 'l', 'u', 'w', 'b')
local revision, nonce, ttl, expires = tonumber(found[1]), found[2], tonumber(found[3]), tonumber(found[4])
local holder, is_leased, wanted = found[5], found[6] and tonumber(found[6]) > now, found[7]
local birth = found[8] -- all of one length: the younger is the greater
local is_gone = revision and not is_leased and expires <= now

local function whole(number) return string.format('%.0f', number) end

-- Few commands and one for all fields: each one costs Redis as much as the rest of the script.
local function set(...) redis.call('HSET', key, ...) end

local function live_on(ms, ...) -- from now on for so long; sets other fields too
  expires = now + ms
  set('x', whole(expires), ...)
  redis.call('PEXPIRE', key, whole(ms + REMEMBERED_MS))
end

local function write(new_revision, new_nonce, record, ms, new_holder, held_until)
  live_on(ms, 'b', birth, 'r', whole(new_revision), 'n', new_nonce, 'd', record, 't', ms, 'l', new_holder, 'u', held_until)
end

local function save_next(new_nonce, record, ms, token, lease_ms) -- lease_ms '': and give the lease back
  local is_held = lease_ms ~= ''
  write(revision + 1, new_nonce, record, tonumber(ms), is_held and token or '', is_held and whole(now + lease_ms) or 0)
  return {'ok', birth, whole(revision + 1), whole(expires)}
end

local function is_older(than_birth, than_revision)
  return birth < than_birth or (birth == than_birth and revision < than_revision)
end

-- Why it can't be had by one who has seen it at some save; nil if it can.
local function refusal(seen_birth, seen_revision, seen_nonce)
  if not revision then return 'none' end
  if is_gone then return 'gone' end
  if seen_birth == '' then return end
  local is_other = birth == seen_birth and revision == seen_revision and nonce ~= seen_nonce
  if is_other or is_older(seen_birth, seen_revision) then return 'lost' end
end

local function tell(seen_nonce) -- the record, to one who doesn't have it
  local facts = {'ok', birth, whole(revision), nonce, whole(expires)}
  if nonce ~= seen_nonce then facts[6] = redis.call('HGET', key, 'd') end
  return facts
end

local operations = {}

function operations.create(new_nonce, record, ms)
  if revision and not is_gone and nonce ~= new_nonce then return {'exists'} end
  birth = string.format('%016.0f', time[1] * 1e6 + time[2]) .. new_nonce
  redis.call('DEL', key)
  write(1, new_nonce, record, tonumber(ms), '', 0)
  return {'ok', birth, '1', whole(expires)}
end

function operations.load(seen_birth, seen_revision, seen_nonce)
  local refused = refusal(seen_birth, tonumber(seen_revision), seen_nonce)
  return refused and {refused} or tell(seen_nonce)
end

function operations.lease(seen_birth, seen_revision, seen_nonce, token, ms, is_wanted)
  local refused = refusal(seen_birth, tonumber(seen_revision), seen_nonce)
  if refused then return {refused} end
  if is_leased and holder ~= token then
    if is_wanted == '1' then set('w', '1') end
    return {'busy'}
  end
  set('l', token, 'u', whole(now + ms), 'w', '')
  return tell(seen_nonce)
end

-- Lease and save in one, by one who has seen the last save.
function operations.claim(seen_birth, seen_revision, seen_nonce, token, new_nonce, record, ms, lease_ms)
  if revision and nonce == new_nonce then return {'ok', birth, whole(revision), whole(expires)} end -- the answer got lost
  local is_other = refusal(seen_birth, tonumber(seen_revision), seen_nonce) or nonce ~= seen_nonce
  if is_other or is_leased then return {'conflict'} end
  if wanted == '1' then set('w', '') end
  return save_next(new_nonce, record, ms, token, lease_ms)
end

function operations.save(token, expected, new_nonce, record, ms, lease_ms)
  if revision and nonce == new_nonce then return {'ok', birth, whole(revision), whole(expires)} end -- the answer got lost
  if not revision or holder ~= token or revision ~= tonumber(expected) then return {'conflict'} end
  return save_next(new_nonce, record, ms, token, lease_ms)
end

-- A lease that nobody else has taken is good again, even if it had run out; again: also one that the server has lost.
function operations.renew(token, expected, ms, again)
  local is_free = again == '1' and not is_leased and revision == tonumber(expected)
  if not revision or (holder ~= token and not is_free) then return {'lost'} end
  live_on(ttl, 'l', token, 'u', whole(now + ms))
  return {wanted == '1' and 'wanted' or 'ok'}
end

function operations.release(token)
  if revision and holder == token then live_on(ttl, 'l', '', 'u', 0) end
  return {'ok'}
end

function operations.delete(token)
  if revision and holder ~= token then return {'conflict'} end
  redis.call('DEL', key)
  return {'ok'}
end

-- After a restart that lost the last writes: put back what was saved, unless somebody went on from it.
function operations.restore(lost_birth, lost_revision, lost_nonce, record, ms)
  if revision and not is_older(lost_birth, tonumber(lost_revision)) then return {'there'} end
  birth = lost_birth
  write(tonumber(lost_revision), lost_nonce, record, tonumber(ms), '', 0)
  return {'ok'}
end

-- The same for what was deleted, or is no longer known: an older revision must not come back.
function operations.drop(lost_birth, lost_revision)
  if not revision or not is_older(lost_birth, lost_revision + 1) then return {'there'} end
  redis.call('DEL', key)
  return {'ok'}
end

return operations[op](unpack(ARGV, 3))
