package mux

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// A moodyWriter takes a random part of what TryWrite gives it, and all that Write does.
type moodyWriter struct {
	got    []byte
	direct int // bytes by TryWrite
}

func (w *moodyWriter) Write(p []byte) (int, error) {
	w.got = append(w.got, p...)
	return len(p), nil
}

func (w *moodyWriter) TryWrite(p []byte) int {
	n := rand.IntN(len(p) + 1)
	w.got = append(w.got, p[:n]...)
	w.direct += n
	return n
}

// TestTryWrite sends data to a WriteTo that Serve writes for: every byte arrives once and
// in order, the window is adjusted, and WriteTo counts both ways. The race detector checks
// that the two never write at once.
func TestTryWrite(t *testing.T) {
	for _, window := range []int{1000, DefaultWindow} {
		t.Run(fmt.Sprint(window), func(t *testing.T) {
			c, ref := connect(t, 1)
			w := &moodyWriter{}
			total := make(chan int64, 1)
			serve(t, c, refuse, func(nc *NewChannel) {
				ch, err := nc.Accept(window)
				if err != nil {
					t.Error(err)
					return
				}
				go func() {
					n, err := ch.WriteTo(w)
					if err != nil {
						t.Error(err)
					}
					total <- n
				}()
			})
			ch, _, err := ref.OpenChannel("input", nil)
			if err != nil {
				t.Fatal(err)
			}
			var sent []byte
			for i := range 5000 {
				part := bytes.Repeat([]byte{byte(i)}, 1+rand.IntN(50))
				if _, err := ch.Write(part); err != nil {
					t.Fatal(err)
				}
				sent = append(sent, part...)
			}
			ch.CloseWrite()
			if n := <-total; n != int64(len(sent)) || !bytes.Equal(w.got, sent) {
				t.Errorf("WriteTo returned %d, and %d bytes of %d arrived, %t", n, len(w.got), len(sent), bytes.Equal(w.got, sent))
			}
			if w.direct == 0 {
				t.Error("Serve wrote nothing")
			}
		})
	}
}
