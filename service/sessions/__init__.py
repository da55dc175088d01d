"""Sessions: texts that stay open between requests. This package holds their records and stores them.

`Session` is the record of one text at one moment, `SessionStore` the contract of every store, `MemoryStore` the store
of a single process and `RedisStore` the store that replicas share. `StateSealer` turns a state into signed text that a
client can keep.

This package must not know HTTP, run a network, or import torch. What is done with a session is decided in `generation`.

Every change goes through one function: `SessionStore.update(key, change)` or, if the lease is kept, `begin`. `change`
is a function from a session to the changed session and an answer. `RedisStore` first applies it to its cached copy and
saves the result if the copy is current (one exchange with Redis, the operation `claim`); otherwise it leases the
session and applies the change to the current one.

In Redis a session is one key, which session.lua changes. Two things are keys of their own, written before the
session's: `SegmentStore` has full segments of text, which never change and which forks share, and `SessionIndex` has
each owner's ids. In a cluster these three are on different nodes, so nothing changes two keys at once.

`RedisServer` calls the script, and decides when calls are refused: it knows that a server was replaced. `LeaseRenewer`
then restores what was lost. `RedisConnections` knows the ways to the masters (`redis_url.py`): an address, Sentinels,
or the nodes of a cluster. `HostNames` looks up where a host is.

A change of the Redis server, such as a restart, may lose the last writes. Each change begins an epoch, and each save's
nonce names the epoch in which it was made. Every replica's `LeaseRenewer` restores what it wrote or read last, and none
serves a call before all have done so (operation `attend` of session.lua). Saves of a later epoch win, so a replica that
restores too late overwrites nothing.

How a session that one replica (A) has leased moves to another one (B):

1. B calls `RedisStore.begin(take_over=True)`. session.lua finds A's lease, sets the session's takeover flag (field `w`)
   and answers "busy". B asks again every 30 ms, for at most twice the length of a lease; then it raises SessionBusy.
2. The thread of A's `LeaseRenewer` renews each lease when a third of its length has passed, and at once if a save of A
   was answered with "takeover". session.lua answers this renewal with "takeover", because the flag is set.
3. A's renewer calls `lease.on_takeover` on a new thread. Its owner saves the session and releases the lease in one
   call, `Lease.save(release=True)`.
4. The next call of B gets the lease, and the record unless B has that very save in its `SessionCache`.
5. If A is dead, its lease ends by itself after `lease_s`; B then gets the record as A saved it last. If A was only
   paused, its later saves raise RevisionConflict, because the lease now has B's token.
"""
