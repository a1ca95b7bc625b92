package main

import (
	"net"
	"sync"
)

// A batchConn writes in a goroutine of its own, which ends with the connection, and
// joins the data of writes that come meanwhile.
type batchConn struct {
	net.Conn

	mu     sync.Mutex
	change *sync.Cond // of the fields below
	queue  []byte
	err    error // of the goroutine, or net.ErrClosed
}

func newBatchConn(c net.Conn) *batchConn {
	b := &batchConn{Conn: c}
	b.change = sync.NewCond(&b.mu)
	go b.run()
	return b
}

func (b *batchConn) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.queue) > 64<<10 && b.err == nil {
		b.change.Wait()
	}
	b.queue = append(b.queue, p...)
	b.change.Broadcast()
	return len(p), b.err
}

func (b *batchConn) Close() error {
	b.mu.Lock()
	b.err = net.ErrClosed
	b.change.Broadcast()
	b.mu.Unlock()
	return b.Conn.Close()
}

func (b *batchConn) run() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		for len(b.queue) == 0 && b.err == nil {
			b.change.Wait()
		}
		if b.err != nil {
			return
		}
		batch := b.queue
		b.queue = nil
		b.change.Broadcast()
		b.mu.Unlock()
		_, err := b.Conn.Write(batch)
		b.mu.Lock()
		if b.err == nil {
			b.err = err
		}
	}
}
