-- What is done to one session in Redis: each call is one operation, done wholly or not at all.
--
-- KEYS[1]  the session, a hash:
--   b  incarnation: which creation this is; later ones are greater      r  revision: how often it was saved
--   n  nonce of the last save. (b, r, n) identify a save: histories that parted have equal revisions and other nonces
--   d  the record (record.py)                                           t  milliseconds that it lives after its last use
--   p  settled text, which most saves don't change (record.py)
--   x  when it expires, unless it is leased                             l  token of the lease
--   u  when the lease ends                                              w  1: another process requests the session
--   s  absent or '' while the session lives. A tombstone has no record: 'deleted', or 'lost' if what was acknowledged
--      last could not be restored
-- ARGV     operation, now, the longest lease, then what the operation needs. Times are milliseconds since 1970; now '':
--          the server's clock. A triple (incarnation, revision, nonce) says which save the caller has; '' for none.
--          settled: field p; '=' if it is the same as in that save.
-- Answers  a word, and what belongs to it.
local key, op, now, longest_lease = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local REMEMBERED_MS = 600000 -- how long tombstones and expired sessions are remembered; longer than any recovery window

local time = redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local stored = redis.call('HMGET', key, 'b', 'r', 'n', 't', 'x', 'l', 'u', 'w', 's')
local incarnation, revision, nonce = stored[1], tonumber(stored[2]), stored[3]
local ttl, expires, holder, lease_end = tonumber(stored[4]), tonumber(stored[5]), stored[6], tonumber(stored[7])
local takeover_requested, tombstone = stored[8] == '1', stored[9]
if tombstone == '' then tombstone = false end
-- A lease that ends later than its longest length from now was given by a clock that has stepped back: it is over.
local is_leased = lease_end and lease_end > now and lease_end <= now + longest_lease
local is_alive = revision and not tombstone
local has_expired = is_alive and not is_leased and expires <= now

local function whole(number) return string.format('%.0f', number) end

-- One HSET for all fields: each command costs Redis as much as the rest of the script.
local function set(...) redis.call('HSET', key, ...) end

local function live_for(ms, ...) -- sets other fields too
  expires = now + ms
  set('x', whole(expires), ...)
  redis.call('PEXPIRE', key, whole(ms + REMEMBERED_MS))
end

local function write(new_incarnation, new_revision, new_nonce, record, ms, settled, new_holder, new_lease_end)
  incarnation, revision = new_incarnation, new_revision
  live_for(ms, 'b', incarnation, 'r', whole(revision), 'n', new_nonce, 'd', record, 't', ms,
    'l', new_holder, 'u', new_lease_end, 'w', '', 's', '')
  if (settled or '') == '' then redis.call('HDEL', key, 'p') elseif settled ~= '=' then set('p', settled) end
end

local function bury(kind, new_incarnation, new_revision, token)
  set('s', kind, 'b', new_incarnation, 'r', whole(new_revision), 'n', '', 'l', token, 'u', 0, 'x', 0, 'd', '')
  redis.call('HDEL', key, 'p')
  redis.call('PEXPIRE', key, REMEMBERED_MS)
end

local function saved() return {'ok', incarnation, whole(revision), whole(expires)} end

local function save_next(new_nonce, record, ms, settled, token, lease_ms) -- lease_ms '': give the lease back as well
  local keeps = lease_ms ~= ''
  write(incarnation, revision + 1, new_nonce, record, tonumber(ms), settled, keeps and token or '',
    keeps and whole(now + lease_ms) or 0)
  return saved()
end

local function is_older(than_incarnation, than_revision)
  return incarnation < than_incarnation or (incarnation == than_incarnation and revision < than_revision)
end

local function is_save(seen_incarnation, seen_revision, seen_nonce)
  return incarnation == seen_incarnation and revision == tonumber(seen_revision) and nonce == seen_nonce
end

-- Why a caller that has seen this save can't have the session; nil if it can.
local function refusal(seen_incarnation, seen_revision, seen_nonce)
  if not revision or tombstone == 'deleted' then return 'none' end
  if tombstone then return 'lost' end
  if has_expired then return 'gone' end
  if seen_incarnation == '' then return end
  seen_revision = tonumber(seen_revision)
  local has_parted = incarnation == seen_incarnation and revision == seen_revision and nonce ~= seen_nonce
  if has_parted or is_older(seen_incarnation, seen_revision) then return 'lost' end
end

local function describe(seen_nonce) -- the record only for a caller that doesn't have it
  local facts = {'ok', incarnation, whole(revision), nonce, whole(expires)}
  if nonce ~= seen_nonce then
    local record = redis.call('HMGET', key, 'd', 'p')
    facts[6], facts[7] = record[1], record[2] or nil
  end
  return facts
end

local operations = {}

function operations.create(new_nonce, record, ms, settled)
  if is_alive and nonce == new_nonce then return saved() end -- a repeated call, whose first answer got lost
  if is_alive and not has_expired then return {'exists'} end
  -- Later than the incarnation before, even if the clock has stepped back since.
  local created = time[1] * 1e6 + time[2]
  if incarnation then created = math.max(created, tonumber(incarnation:sub(1, 16)) + 1) end
  -- No DEL first: after a write Redis no longer checks its memory limit.
  write(string.format('%016.0f', created) .. new_nonce, 1, new_nonce, record, tonumber(ms), settled, '', 0)
  return saved()
end

function operations.load(seen_incarnation, seen_revision, seen_nonce)
  local refused = refusal(seen_incarnation, seen_revision, seen_nonce)
  return refused and {refused} or describe(seen_nonce)
end

-- For a list: the record up to its header, if the session is there. In version 1 the header doesn't suffice.
function operations.summarize()
  local refused = refusal('')
  if refused then return {refused} end
  local record = redis.call('HGET', key, 'd') or ''
  if record:byte(1) ~= 1 and #record >= 5 then record = record:sub(1, 5 + struct.unpack('<I4', record, 2)) end
  return {'ok', whole(expires), record}
end

function operations.lease(seen_incarnation, seen_revision, seen_nonce, token, ms, requests_takeover)
  local refused = refusal(seen_incarnation, seen_revision, seen_nonce)
  if refused then return {refused} end
  if is_leased and holder ~= token then
    if requests_takeover == '1' then set('w', '1') end
    return {'busy'}
  end
  set('l', token, 'u', whole(now + ms), 'w', '')
  return describe(seen_nonce)
end

-- Compare and save: lease and save in one, for a caller that has seen the last save.
function operations.claim(seen_incarnation, seen_revision, seen_nonce, token, new_nonce, record, ms, lease_ms, settled)
  if is_alive and nonce == new_nonce then return saved() end -- a repeated call, whose first answer got lost
  local is_current = is_alive and not has_expired and is_save(seen_incarnation, seen_revision, seen_nonce)
  if not is_current or is_leased then return {'conflict'} end
  return save_next(new_nonce, record, ms, settled, token, lease_ms)
end

function operations.save(token, seen_incarnation, seen_revision, seen_nonce, new_nonce, record, ms, lease_ms, settled)
  if is_alive and nonce == new_nonce then return saved() end -- a repeated call, whose first answer got lost
  if not is_alive or holder ~= token or not is_save(seen_incarnation, seen_revision, seen_nonce) then
    return {'conflict'}
  end
  local requested = takeover_requested and '1' or ''
  local answer = save_next(new_nonce, record, ms, settled, token, lease_ms)
  if requested == '1' and lease_ms ~= '' then set('w', '1') end
  return answer
end

-- A lease that nobody else has taken is valid again, even if it had run out. After a restart (`again`) also one that the
-- server has lost, if the session is at the save that the caller has.
function operations.renew(token, seen_incarnation, seen_revision, seen_nonce, ms, again)
  local is_mine = is_alive and holder == token
  local is_free = again == '1' and is_alive and not is_leased
  if again == '1' and not is_save(seen_incarnation, seen_revision, seen_nonce) then return {'lost'} end
  if not is_mine and not is_free then return {'lost'} end
  live_for(ttl, 'l', token, 'u', whole(now + ms))
  return {takeover_requested and 'takeover' or 'ok'}
end

function operations.release(token)
  if is_alive and holder == token then live_for(ttl, 'l', '', 'u', 0) end
  return {'ok'}
end

-- A tombstone stays, by which a restart's recovery knows that an older copy is not to be restored. It counts as a save:
-- whatever order the replicas restore in, the deletion is later than the save that it deleted.
function operations.delete(token)
  if tombstone == 'deleted' and holder == token then return {'ok'} end -- a repeated call, whose first answer got lost
  if not is_alive or holder ~= token then return {'conflict'} end
  bury('deleted', incarnation, revision + 1, token)
  return {'ok'}
end

-- After a restart that may have lost the last writes: does the server lack this save?
function operations.lacks(seen_incarnation, seen_revision)
  return {(not revision or is_older(seen_incarnation, tonumber(seen_revision))) and 'yes' or 'no'}
end

-- Store a lost save again, unless the server has a later one.
function operations.restore(seen_incarnation, seen_revision, seen_nonce, record, ttl_ms, left_ms, settled)
  if revision and not is_older(seen_incarnation, tonumber(seen_revision)) then return {'there'} end
  write(seen_incarnation, tonumber(seen_revision), seen_nonce, record, tonumber(ttl_ms), settled, '', 0)
  expires = now + tonumber(left_ms)
  set('x', whole(expires))
  return {'ok'}
end

-- The same for a session that was deleted ('deleted'), or whose record no replica has any more ('lost').
function operations.bury(seen_incarnation, seen_revision, kind)
  if revision and not is_older(seen_incarnation, tonumber(seen_revision)) then return {'there'} end
  bury(kind, seen_incarnation, seen_revision, '')
  return {'ok'}
end

-- What sessions need of a server, done to a key of its own.
function operations.probe()
  set('d', '')
  redis.call('PEXPIRE', key, 10000)
  redis.call('HGET', key, 'd')
  redis.call('HDEL', key, 'x')
  return {redis.call('HLEN', key) > 0 and redis.call('EXISTS', key) == 1 and redis.call('PTTL', key) > 0 and 'ok'}
end

-- The following are for stored segments (segment_store.py), which are no sessions: the field `c` has the content, and the
-- other fields name the sessions that need it. Let it live for a session, and write it if there is a content.
function operations.segment(ms, content, creation)
  if redis.call('EXISTS', key) == 0 then
    if content == '' then return {'none'} end
    set('c', content)
  end
  set(creation, '')
  if redis.call('PTTL', key) < tonumber(ms) then redis.call('PEXPIRE', key, ms) end
  return {'ok'}
end

-- A session no longer needs it.
function operations.unlink(creation)
  redis.call('HDEL', key, creation)
  if redis.call('HLEN', key) == 1 then redis.call('DEL', key) end
  return {'ok'}
end

return operations[op](unpack(ARGV, 4))
