package relay

import (
	"io"
	"runtime"
	"testing"
)

// BenchmarkThroughput downloads through the relay. The figures include the
// client and the bastion, which run in this process too.
func BenchmarkThroughput(b *testing.B) {
	w := join(b, permitAll(), overTCP)
	near, far := w.open("direct-tcpip")
	const size = 4 << 20
	block := make([]byte, size)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		go far.Write(block)
		if _, err := io.ReadFull(near, block); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkEcho is a keystroke's way to the bastion and back.
func BenchmarkEcho(b *testing.B) {
	w := join(b, permitAll(), overTCP)
	near, far := w.open("session")
	go io.Copy(far, far)
	key := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		near.Write(key)
		if _, err := io.ReadFull(near, key); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIdleSession tells what one more idle session costs, the four ends of
// package ssh included: two of the four are the gateway's.
func BenchmarkIdleSession(b *testing.B) {
	r := permitAll()
	r.MaxSessions, r.MaxChannels = 200, 200
	w := join(b, r, overTCP)
	w.open("session") // what comes with the first
	const sessions = 100
	for b.Loop() {
		goroutines, before := runtime.NumGoroutine(), inUse()
		var near, far [sessions]channel
		for i := range sessions {
			near[i], far[i] = w.open("session")
		}
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/sessions, "goroutines/session")
		b.ReportMetric(float64(inUse()-before)/sessions, "B/session")
		for i := range sessions {
			far[i].SendRequest("exit-status", false, []byte{0, 0, 0, 0})
			far[i].Close()
			for range near[i].reqs {
			}
		}
	}
}

// inUse returns the bytes of heap and stacks in use.
func inUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}
