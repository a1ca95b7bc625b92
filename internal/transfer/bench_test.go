package transfer

import (
	"strings"
	"testing"
)

// BenchmarkSFTP uploads in writes of 32 KiB, as OpenSSH does.
func BenchmarkSFTP(b *testing.B) {
	s := NewSFTP(func(Event) error { return nil })
	s.FromClient(sftpBegin[0].p)
	s.FromServer(sftpBegin[1].p)
	s.FromClient(packet(fxpOpen, u32(1), str("f"), u32(2), noAttrs))
	s.FromServer(packet(fxpHandle, u32(1), str("h")))
	write, ok := packet(fxpWrite, u32(1), str("h"), u64(0), str(strings.Repeat("x", 32<<10))), status(1, 0)
	b.SetBytes(int64(len(write)))
	b.ReportAllocs()
	for b.Loop() {
		if err := s.FromClient(write); err != nil {
			b.Fatal(err)
		}
		if err := s.FromServer(ok); err != nil {
			b.Fatal(err)
		}
	}
}
