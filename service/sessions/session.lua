-- What is done to one session in Redis: each call is one operation, done wholly or not at all.
--
-- KEYS[1]  the session, a hash:
--   b  incarnation: which creation this is; later ones are greater      r  revision: how often it was saved
--   n  nonce of the last save, which begins with the epoch in which it was made (see `attend`). (b, r, n) identify a
--      save: histories that parted have equal revisions and other nonces
--   h  the last revision in each epoch before that of the last save: 'epoch:revision ', the latest entry last
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
local NO_EPOCH = '0000000000000000' -- of saves by versions of the service that had no epochs
local NONCE_BYTES = 28 -- 16 digits of the epoch, 12 random bytes
local MAX_EPOCHS = 8 -- in `h`

local time = redis.call('TIME')
now = now or time[1] * 1000 + math.floor(time[2] / 1000)

local stored = redis.call('HMGET', key, 'b', 'r', 'n', 't', 'x', 'l', 'u', 'w', 's', 'h')
local incarnation, revision, nonce = stored[1], tonumber(stored[2]), stored[3]
local ttl, expires, holder, lease_end = tonumber(stored[4]), tonumber(stored[5]), stored[6], tonumber(stored[7])
local takeover_requested, tombstone, history = stored[8] == '1', stored[9], stored[10] or ''
if tombstone == '' then tombstone = false end
-- All that is computed with below. The answer is the one for a key of another type: both concern this session alone.
local is_sound = not revision or nonce and #(incarnation and incarnation:match('^%d+') or '') >= 16
  and (tombstone == 'deleted' or tombstone == 'lost' or not tombstone and ttl and expires)
if not is_sound then return redis.error_reply('WRONGTYPE the record is damaged') end
-- A lease that ends later than its longest length from now was given by a clock that has stepped back: it is over.
local is_leased = lease_end and lease_end > now and lease_end <= now + longest_lease
local is_alive = revision and not tombstone
local has_expired = is_alive and not is_leased and expires <= now

local function whole(number) return string.format('%.0f', number) end

local function epoch_of(save) return #save == NONCE_BYTES and save:sub(1, 16) or NO_EPOCH end
local epoch = epoch_of(nonce or '')

-- A caller that has not noticed the present epoch yet saves in that of the save before: epochs never go back.
local function lifted(new_nonce)
  return #new_nonce == NONCE_BYTES and epoch_of(new_nonce) < epoch and epoch .. new_nonce:sub(17) or new_nonce
end

-- Whether the last save is one with this nonce: then its caller repeats a call whose first answer got lost.
local function is_done(new_nonce) return nonce and nonce:sub(-12) == new_nonce:sub(-12) end

-- One HSET for all fields: each command costs Redis as much as the rest of the script.
local function set(...) redis.call('HSET', key, ...) end

local function live_for(ms, ...) -- sets other fields too
  expires = now + ms
  set('x', whole(expires), ...)
  redis.call('PEXPIRE', key, whole(ms + REMEMBERED_MS))
end

local function write(new_incarnation, new_revision, new_nonce, record, ms, settled, new_holder, new_lease_end, new_history)
  incarnation, revision, nonce = new_incarnation, new_revision, new_nonce
  if new_history ~= history then set('h', new_history) end
  live_for(ms, 'b', incarnation, 'r', whole(revision), 'n', new_nonce, 'd', record, 't', ms,
    'l', new_holder, 'u', new_lease_end, 'w', '', 's', '')
  if (settled or '') == '' then redis.call('HDEL', key, 'p') elseif settled ~= '=' then set('p', settled) end
end

local function bury(kind, new_incarnation, new_revision, new_nonce, token)
  set('s', kind, 'b', new_incarnation, 'r', whole(new_revision), 'n', new_nonce, 'l', token, 'u', 0, 'x', 0, 'd', '')
  redis.call('HDEL', key, 'p', 'h')
  redis.call('PEXPIRE', key, REMEMBERED_MS)
end

local function saved() return {'ok', incarnation, whole(revision), whole(expires), nonce} end

local function history_with(new_nonce) -- the history of a save that follows the stored one
  if epoch_of(new_nonce) == epoch then return history end
  local entries = history .. epoch .. ':' .. whole(revision) .. ' '
  local _, num_entries = entries:gsub(' ', ' ')
  return num_entries > MAX_EPOCHS and entries:gsub('^%S+ ', '') or entries
end

local function save_next(new_nonce, record, ms, settled, token, lease_ms) -- lease_ms '': give the lease back as well
  local keeps = lease_ms ~= ''
  new_nonce = lifted(new_nonce)
  write(incarnation, revision + 1, new_nonce, record, tonumber(ms), settled, keeps and token or '',
    keeps and whole(now + lease_ms) or 0, history_with(new_nonce))
  return saved()
end

-- Whether the server lacks a save, and may store it again: nobody has saved since the epoch in which it was made.
-- Within an epoch all saves of a session are one line, because each is made on condition that the one before is stored.
local function is_missing(of_incarnation, of_revision, of_nonce)
  if not revision then return true end
  of_revision = tonumber(of_revision)
  local of_epoch = epoch_of(of_nonce)
  if epoch ~= of_epoch and epoch ~= NO_EPOCH then return epoch < of_epoch end
  if incarnation ~= of_incarnation then return incarnation < of_incarnation end
  return revision < of_revision or (tombstone == 'lost' and revision == of_revision and nonce == of_nonce)
end

-- Whether the stored save is this one or followed it. Of epochs before those in `h` nothing is known: then it is.
local function follows(seen_revision, seen_nonce)
  local seen_epoch, first = epoch_of(seen_nonce), nil
  if seen_epoch == epoch or epoch == NO_EPOCH then
    return seen_revision < revision or (seen_revision == revision and nonce == seen_nonce)
  end
  for entry, last in history:gmatch('(%d+):(%d+)') do
    if entry == seen_epoch then return seen_revision <= tonumber(last) end
    first = first or entry
  end
  return seen_epoch < (first or epoch)
end

local function is_save(seen_incarnation, seen_revision, seen_nonce)
  return incarnation == seen_incarnation and revision == tonumber(seen_revision) and nonce == seen_nonce
end

-- Why a caller that has seen this save can't have the session; nil if it can.
local function refusal(seen_incarnation, seen_revision, seen_nonce)
  if not revision then return 'none' end
  if tombstone then return tombstone end
  if has_expired then return 'gone' end
  if seen_incarnation == '' or seen_incarnation < incarnation then return end
  if incarnation < seen_incarnation or not follows(tonumber(seen_revision), seen_nonce) then return 'lost' end
end

-- A deletion that was seen has to stay, like a save that was: its caller is told which it is.
local function refused_with(word) return word == 'deleted' and {word, incarnation, whole(revision), nonce} or {word} end

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
  if is_alive and is_done(new_nonce) then return saved() end
  if is_alive and not has_expired then return {'exists'} end
  -- Later than the incarnation before, even if the clock has stepped back since.
  local created = time[1] * 1e6 + time[2]
  if incarnation then created = math.max(created, tonumber(incarnation:sub(1, 16)) + 1) end
  -- No DEL first: after a write Redis no longer checks its memory limit.
  write(string.format('%016.0f', created) .. new_nonce, 1, lifted(new_nonce), record, tonumber(ms), settled, '', 0, '')
  return saved()
end

function operations.load(seen_incarnation, seen_revision, seen_nonce)
  local refused = refusal(seen_incarnation, seen_revision, seen_nonce)
  return refused and refused_with(refused) or describe(seen_nonce)
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
  if refused then return refused_with(refused) end
  if is_leased and holder ~= token then
    if requests_takeover == '1' then set('w', '1') end
    return {'busy'}
  end
  set('l', token, 'u', whole(now + ms), 'w', '')
  return describe(seen_nonce)
end

-- Compare and save: lease and save in one, for a caller that has seen the last save.
function operations.claim(seen_incarnation, seen_revision, seen_nonce, token, new_nonce, record, ms, lease_ms, settled)
  if is_alive and is_done(new_nonce) then return saved() end
  local is_current = is_alive and not has_expired and is_save(seen_incarnation, seen_revision, seen_nonce)
  if not is_current or is_leased then return {'conflict'} end
  return save_next(new_nonce, record, ms, settled, token, lease_ms)
end

function operations.save(token, seen_incarnation, seen_revision, seen_nonce, new_nonce, record, ms, lease_ms, settled)
  if is_alive and is_done(new_nonce) then return saved() end
  if not revision then return {'none'} end
  if not is_alive or holder ~= token or not is_save(seen_incarnation, seen_revision, seen_nonce) then
    return {'conflict'}
  end
  local requested = takeover_requested and '1' or ''
  local answer = save_next(new_nonce, record, ms, settled, token, lease_ms)
  if requested == '1' and lease_ms ~= '' then
    set('w', '1')
    answer[1] = 'takeover' -- the lease is renewed by this save, so that a renewal which says so may not be due for long
  end
  return answer
end

-- A lease that nobody else has taken is valid again, even if it had run out. After a restart (`again`) also one that the
-- server has lost, if the session is at the save that the caller has. 'none': nobody deletes a leased session without a
-- tombstone, so the server has lost it.
function operations.renew(token, seen_incarnation, seen_revision, seen_nonce, ms, again)
  if not revision then return {'none'} end
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
function operations.delete(token, new_nonce)
  if tombstone == 'deleted' and holder == token then return {'ok', nonce} end -- the first answer got lost
  if not is_alive or holder ~= token then return {'conflict'} end
  new_nonce = lifted(new_nonce or '')
  bury('deleted', incarnation, revision + 1, new_nonce, token)
  return {'ok', new_nonce}
end

-- After a restart that may have lost the last writes: does the server lack this save? 'parted': others have continued from
-- an older one.
function operations.lacks(seen_incarnation, seen_revision, seen_nonce)
  if is_missing(seen_incarnation, seen_revision, seen_nonce) then return {'yes'} end
  local has_parted = is_alive and refusal(seen_incarnation, seen_revision, seen_nonce) == 'lost'
  return {has_parted and 'parted' or 'no'}
end

-- Store a lost save again. `only_over`: not if there is no session at all, which may have been deleted long ago.
function operations.restore(seen_incarnation, seen_revision, seen_nonce, record, ttl_ms, left_ms, settled, only_over)
  if not is_missing(seen_incarnation, seen_revision, seen_nonce) then return {'there'} end
  if only_over == '1' and not revision then return {'none'} end
  -- What the saves in between were is not known here.
  local new_history = revision and incarnation == seen_incarnation and epoch == epoch_of(seen_nonce) and history or ''
  write(seen_incarnation, tonumber(seen_revision), seen_nonce, record, tonumber(ttl_ms), settled, '', 0, new_history)
  expires = now + tonumber(left_ms)
  set('x', whole(expires))
  return {'ok'}
end

-- The same for a session that was deleted ('deleted'), or whose record this process no longer has ('lost').
function operations.bury(seen_incarnation, seen_revision, seen_nonce, kind, only_over)
  if not is_missing(seen_incarnation, seen_revision, seen_nonce) then return {'there'} end
  if only_over == '1' and not revision then return {'none'} end
  bury(kind, seen_incarnation, tonumber(seen_revision), seen_nonce, '')
  return {'ok'}
end

-- Is there a session, and which is its last save? For a process that has a copy.
function operations.exists()
  return {refusal('') or 'ok', nonce or ''}
end

-- What each process does once a second to a key of the server's own. It says that it is there, and learns in which epoch
-- the server is, and whether all calls have to wait.
--
-- An epoch is the time between two changes of the server that may have lost writes: each change begins one. In a new epoch
-- the server recovers. Each process restores what it knows of earlier epochs, and none serves a call before all processes
-- have done so: those that were there, unless they are silent for `patience`, and for `window` also those that the server
-- doesn't know. A process that was silent for longer, such as one that was stopped, restores late, and only what nobody has
-- changed since (`is_missing`).
--   e  the epoch: 16 digits, greater than all before       i  the server's process, which is another one after a restart
--   o  when `window` ends                                  m  processes: 'name,epoch it has restored in,silent from;'
-- A user that lacks a permission which a session, a segment or an index needs is refused here: else each call that needs
-- it would stop all sessions until they have recovered, and the next one would do so again.
-- known     the latest epoch that the caller knows       left   '', or an epoch in which the caller saw a server that was
-- restored  '', or an epoch in which it has restored            a replica and may have other data since
-- patience  '' if the caller leaves
-- Answers   the epoch, and for how many milliseconds calls have to wait: '' if nobody knows.
function operations.attend(run, known, left, name, restored, window, patience)
  local needed = {
    {'PING'}, {'HGET', key, 'e'}, {'HDEL', key, 'x'}, {'HLEN', key}, {'DEL', key}, {'EXISTS', key}, {'PTTL', key},
    {'ZADD', key, 0, ''}, {'ZREM', key, ''}, {'ZRANGEBYLEX', key, '-', '+'}, {'ZRANDMEMBER', key, 1}, {'SET', key, ''},
  }
  for _, command in ipairs(needed) do
    if not redis.acl_check_cmd(unpack(command)) then return redis.error_reply('NOPERM no ' .. command[1]) end
  end
  local facts = redis.call('HMGET', key, 'e', 'i', 'o', 'm')
  -- A damaged epoch is one that the server has lost: the callers know a later one.
  local current = (facts[1] or ''):match('^' .. ('%d'):rep(16) .. '$') or NO_EPOCH
  local opens, members, num_missing = tonumber(facts[3] or 0) or 0, {}, 0
  local has_changed = facts[2] ~= run or current == left
  local begins = has_changed or current < known
  window = tonumber(window)
  local longest = tonumber(patience) or 4 * window
  if has_changed then
    -- Later than the epoch before, even if the clock has stepped back since.
    current = math.max(time[1] * 1e6 + time[2], tonumber(current) + 1, tonumber(known) + 1)
    current = string.format('%016.0f', current)
  elseif begins then
    current = known -- of another server
  end
  if begins then opens = now + window end
  for other, epoch_restored, silent in (facts[4] or ''):gmatch('(%w+),(%d*),(%d+);') do
    silent = begins and now + longest or math.min(tonumber(silent), now + longest)
    if other ~= name and silent > now then
      members[#members + 1] = other .. ',' .. epoch_restored .. ',' .. whole(silent) .. ';'
      if epoch_restored ~= current then num_missing = num_missing + 1 end
    end
  end
  if patience ~= '' then members[#members + 1] = name .. ',' .. restored .. ',' .. whole(now + longest) .. ';' end
  set('e', current, 'i', run, 'o', whole(opens), 'm', table.concat(members))
  redis.call('PEXPIRE', key, 30 * 24 * 3600 * 1000)
  if restored ~= current or num_missing > 0 then return {current, ''} end
  return {current, whole(math.max(0, math.min(opens, now + window) - now))}
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
