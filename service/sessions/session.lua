-- The operations on one session in Redis. Each call is one operation, and atomic.
--
-- KEYS[1]  the session, a hash with these fields (replicas of the previous version read and write the same ones):
--   r  revision: the number of saves
--   n  nonce of the last save: after a loss of data a revision may be assigned twice, a nonce never is
--   b  incarnation: the time of creation and a nonce; identifies the creation of this session
--   d  the record (record.py)
--   t  ttl: milliseconds that the session lives after its last use
--   x  the time at which it expires unless it is leased
--   l  token of the lease, '' without one
--   u  the time at which the lease ends
--   w  '1' if another process has requested a takeover
-- ARGV     operation, now, then the operation's arguments. Times are milliseconds since 1970; now = '' stands for the
--          server's clock, which is the same for all replicas.
-- Returns  a word, then what belongs to it:
--   ok        incarnation, revision, (load and lease: nonce,) time of expiry, (load and lease: record if it differs)
--   missing   there is no such session           expired   it has expired, but the hash is still there
--   lost      Redis has an older save than the caller knows of, or (renew) the lease is no longer the caller's
--   exists, busy, conflict, takeover, unchanged   see the operation
--
-- The caller identifies the save that it knows by known_incarnation, known_revision and known_nonce; '' if by none.
local key, op, now = KEYS[1], ARGV[1], tonumber(ARGV[2])
local REMEMBERED_MS = 600000 -- an expired session's hash stays this long, to answer `expired` instead of `missing`

local time = redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local fields = redis.call('HMGET', key, 'r', 'n', 't', 'x', 'l', 'u', 'w', 'b')
local revision, nonce, ttl, expires = tonumber(fields[1]), fields[2], tonumber(fields[3]), tonumber(fields[4])
local lease_token, is_leased = fields[5], fields[6] and tonumber(fields[6]) > now
local takeover_requested = fields[7] == '1'
local incarnation = fields[8] -- all have the same length, so a later creation compares as greater
local is_expired = revision and not is_leased and expires <= now

local function whole(number) return string.format('%.0f', number) end

-- One HSET for all fields: each command costs Redis as much as the rest of the script.
local function set(...) redis.call('HSET', key, ...) end

local function extend_life(ms, ...) -- expire `ms` from now; sets other fields in the same command
  expires = now + ms
  set('x', whole(expires), ...)
  redis.call('PEXPIRE', key, whole(ms + REMEMBERED_MS))
end

local function write(new_revision, new_nonce, record, ms, token, leased_until)
  extend_life(ms, 'b', incarnation, 'r', whole(new_revision), 'n', new_nonce, 'd', record, 't', ms,
    'l', token, 'u', leased_until)
end

local function saved()
  return {'ok', incarnation, whole(revision), whole(expires)}
end

local function save_next(new_nonce, record, ms, token, lease_ms) -- lease_ms = '': release the lease
  local keeps_lease = lease_ms ~= ''
  revision = revision + 1
  write(revision, new_nonce, record, tonumber(ms), keeps_lease and token or '',
    keeps_lease and whole(now + lease_ms) or 0)
  return saved()
end

local function is_older(than_incarnation, than_revision)
  return incarnation < than_incarnation or (incarnation == than_incarnation and revision < than_revision)
end

-- Why the session can't be given to a caller who knows this save; nil if it can.
local function why_unavailable(known_incarnation, known_revision, known_nonce)
  if not revision then return 'missing' end
  if is_expired then return 'expired' end
  if known_incarnation == '' then return end
  local has_diverged = incarnation == known_incarnation and revision == known_revision and nonce ~= known_nonce
  if has_diverged or is_older(known_incarnation, known_revision) then return 'lost' end
end

local function loaded(known_nonce) -- the record is left out if the caller has it
  local answer = {'ok', incarnation, whole(revision), nonce, whole(expires)}
  if nonce ~= known_nonce then answer[6] = redis.call('HGET', key, 'd') end
  return answer
end

local operations = {}

-- exists: there is a session with this id. With the nonce of this very call it is the caller's, whose first attempt
-- was done and whose answer was lost.
function operations.create(new_nonce, record, ms)
  if revision and not is_expired and nonce ~= new_nonce then return {'exists'} end
  incarnation = string.format('%016.0f', time[1] * 1e6 + time[2]) .. new_nonce
  redis.call('DEL', key)
  revision = 1
  write(revision, new_nonce, record, tonumber(ms), '', 0)
  return saved()
end

function operations.load(known_incarnation, known_revision, known_nonce)
  local reason = why_unavailable(known_incarnation, tonumber(known_revision), known_nonce)
  return reason and {reason} or loaded(known_nonce)
end

-- busy: another caller has the lease. take_over = '1' asks it to release.
function operations.lease(known_incarnation, known_revision, known_nonce, token, ms, take_over)
  local reason = why_unavailable(known_incarnation, tonumber(known_revision), known_nonce)
  if reason then return {reason} end
  if is_leased and lease_token ~= token then
    if take_over == '1' then set('w', '1') end
    return {'busy'}
  end
  set('l', token, 'u', whole(now + ms), 'w', '')
  return loaded(known_nonce)
end

-- Compare and save, and lease, in one call. conflict: the save that the caller knows is not the last one, or the
-- session is leased.
function operations.claim(known_incarnation, known_revision, known_nonce, token, new_nonce, record, ms, lease_ms)
  if revision and nonce == new_nonce then return saved() end -- done by a first attempt whose answer was lost
  local reason = why_unavailable(known_incarnation, tonumber(known_revision), known_nonce)
  if reason or nonce ~= known_nonce or is_leased then return {'conflict'} end
  if takeover_requested then set('w', '') end
  return save_next(new_nonce, record, ms, token, lease_ms)
end

-- conflict: the lease is not the caller's, or the session has another revision than the caller expects.
function operations.save(token, expected_revision, new_nonce, record, ms, lease_ms)
  if revision and nonce == new_nonce then return saved() end -- done by a first attempt whose answer was lost
  if not revision or lease_token ~= token or revision ~= tonumber(expected_revision) then return {'conflict'} end
  return save_next(new_nonce, record, ms, token, lease_ms)
end

-- Renew a lease, also one that has ended and that nobody else has taken; after a restart = '1' also one that the server
-- has lost. takeover: it is renewed, and another process has requested it.
function operations.renew(token, expected_revision, ms, after_restart)
  local is_free = after_restart == '1' and not is_leased and revision == tonumber(expected_revision)
  if not revision or (lease_token ~= token and not is_free) then return {'lost'} end
  extend_life(ttl, 'l', token, 'u', whole(now + ms))
  return {takeover_requested and 'takeover' or 'ok'}
end

function operations.release(token)
  if revision and lease_token == token then extend_life(ttl, 'l', '', 'u', 0) end
  return {'ok'}
end

-- conflict: the lease is not the caller's.
function operations.delete(token)
  if revision and lease_token ~= token then return {'conflict'} end
  redis.call('DEL', key)
  return {'ok'}
end

-- After a restart that lost the last writes: write a save again. unchanged: Redis has this save or a later one.
function operations.restore(lost_incarnation, lost_revision, lost_nonce, record, ms)
  if revision and not is_older(lost_incarnation, tonumber(lost_revision)) then return {'unchanged'} end
  incarnation = lost_incarnation
  write(tonumber(lost_revision), lost_nonce, record, tonumber(ms), '', 0)
  return {'ok'}
end

-- After such a restart, for a session that was deleted or whose last save is not cached any more: an older revision
-- must not be served again. unchanged: Redis has nothing, or a later save.
function operations.drop(lost_incarnation, lost_revision)
  if not revision or not is_older(lost_incarnation, lost_revision + 1) then return {'unchanged'} end
  redis.call('DEL', key)
  return {'ok'}
end

return operations[op](unpack(ARGV, 3))
