package transport

import (
	"fmt"
	"runtime"
	"testing"
	"time"
)

// BenchmarkPackets moves packets of data from one Conn to another over TCP. It
// must not allocate.
func BenchmarkPackets(b *testing.B) {
	for _, cipher := range []Config{
		{Ciphers: []string{"aes128-gcm@openssh.com"}},
		{Ciphers: []string{"aes256-ctr"}, MACs: []string{"hmac-sha2-256-etm@openssh.com"}},
		{Ciphers: []string{"aes256-ctr"}, MACs: []string{"hmac-sha2-256"}},
	} {
		for _, size := range []int{64, 32 << 10} {
			b.Run(fmt.Sprintf("%s/%d", cipher.testName(), size), func(b *testing.B) {
				cfg := cipher
				client, server := pair(b, &cfg, &Config{})
				payload := make([]byte, size)
				payload[0] = 94
				done := make(chan error, 1)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				go func() {
					for range b.N {
						if _, err := server.ReadPacket(); err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
				const turn = 128 << 10
				written := 0
				for range b.N {
					client.WritePacket(payload)
					if written += size; written >= turn {
						written = 0
						client.WaitWritable(turn)
					}
				}
				client.Flush()
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkHandshake does the key exchange of both sides.
func BenchmarkHandshake(b *testing.B) {
	for _, kex := range DefaultKexAlgorithms[:2] {
		b.Run(kex, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				client, server := pair(b, &Config{KexAlgorithms: []string{kex}}, &Config{HostKeys: hostKeys()[:1]})
				client.Close()
				server.Close()
			}
		})
	}
}

// TestIdleMemory limits the heap and the stack of each end of an idle connection. On
// each end, a goroutine blocks in ReadPacket, as in a relay.
func TestIdleMemory(t *testing.T) {
	const n = 200
	measure := func() (heap, stack int) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc), int(m.StackInuse)
	}
	cfg, serverConfig := &Config{}, &Config{HostKeys: hostKeys()[:1]}
	pair(t, cfg, serverConfig) // so that allocations made once are not counted
	heapBefore, stackBefore := measure()
	for range n {
		client, server := pair(t, cfg, serverConfig)
		for _, c := range []*Conn{client, server} {
			go func() {
				for {
					if _, err := c.ReadPacket(); err != nil {
						return
					}
				}
			}()
		}
		for range 10 {
			client.WritePacket(make20(94, 20000))
			server.WritePacket(make20(94, 20000))
		}
		client.Flush()
		server.Flush()
	}
	// Once the goroutines have read all packets, each garbage collection halves
	// their stacks.
	for tries := 0; ; tries++ {
		heap, stack := measure()
		heap, stack = (heap-heapBefore)/(2*n), (stack-stackBefore)/(2*n)
		t.Logf("each end of an idle connection: %d bytes of heap, %d of stack", heap, stack)
		if heap < 7<<10 && stack <= 8<<10 {
			break
		}
		if tries == 100 {
			t.Fatalf("an idle end of a connection holds %d bytes of heap and %d of stack", heap, stack)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func make20(number byte, size int) []byte {
	p := make([]byte, size)
	p[0] = number
	return p
}
