package relay

import (
	"sync"
	"sync/atomic"
)

// Expect sets the text that is used in place of Lost and of the refusal, for a caller
// that knows why the bastion's connection is about to end. A [Watcher] may call it.
func (r *Relay) Expect(text string) {
	r.notices.add(notice{expect: text})
	r.deliver()
}

// Tell writes a line to every terminal of the connection whose window has room for it. It
// does not block. A [Watcher] may call it.
func (r *Relay) Tell(line string) {
	r.notices.add(notice{line: "\r\n" + line + "\r\n"})
	r.deliver()
}

// A notice is a line for terminals, or the text of Expect.
type notice struct{ line, expect string }

// notices wait for the lock of a Relay. They have a lock of their own, so that a
// [Watcher], which is called with the Relay's lock held, can add one.
type notices struct {
	mu    sync.Mutex
	list  []notice
	count atomic.Int32 // of list
}

func (n *notices) add(one notice) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = append(n.list, one)
	n.count.Store(int32(len(n.list)))
}

func (n *notices) take() []notice {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.list
	n.list = nil
	n.count.Store(0)
	return list
}

// deliver delivers notices now, or leaves them to the goroutine that holds the lock.
func (r *Relay) deliver() {
	if r.mu.TryLock() {
		r.unlock()
	}
}

// unlock delivers the notices that were added while the lock was held, and unlocks.
func (r *Relay) unlock() {
	for {
		if r.notices.count.Load() > 0 {
			for _, n := range r.notices.take() {
				if n.expect != "" {
					r.expected = n.expect
					continue
				}
				r.tell(n)
			}
		}
		r.mu.Unlock()
		// A caller that could not lock may have added another notice.
		if r.notices.count.Load() == 0 || !r.mu.TryLock() {
			return
		}
	}
}
