package transport

import (
	"errors"
	"strings"
	"testing"
)

// TestVersions sends identification strings.
func TestVersions(t *testing.T) {
	const invalid = "Invalid SSH identification string.\r\n"
	for _, tt := range []struct{ name, line, want string }{
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", invalid},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00", invalid},
		{"nothing", "\r\n", invalid},
		{"lines before it", "hello\r\nSSH-2.0-x\r\n", invalid},
		{"SSH 1", "SSH-1.5-x\r\n", "Protocol major versions differ.\r\n"},
		{"SSH 3", "SSH-3.0-x\r\n", "Protocol major versions differ.\r\n"},
		{"too long", "SSH-2.0-" + strings.Repeat("x", 300) + "\r\n", invalid},
		{"too long without an end", "SSH-2.0-" + strings.Repeat("x", 300), invalid},
		{"NUL", "SSH-2.0-x\x00y\r\n", invalid},
		{"CR within", "SSH-2.0-x\ry\r\n", invalid},
		{"255 bytes", "SSH-2.0-" + strings.Repeat("x", 255-10) + "\r\n", ""},
		{"256 bytes", "SSH-2.0-" + strings.Repeat("x", 256-10) + "\r\n", invalid},
		{"no CR", "SSH-2.0-x\n", ""},
		{"1.99", "SSH-1.99-x\r\n", ""},
		{"comment", "SSH-2.0-x y z\r\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := attack(t, &Config{}, &Config{CiphersFor: func(string) []string { return DefaultCiphers }})
			if err := m.readVersion(); err != nil {
				t.Fatal(err)
			}
			m.sendBytes([]byte(tt.line)...)
			if tt.want == "" {
				m.serverInit()
				if err := m.end(); errors.Is(err, ErrVersion) {
					t.Error(err)
				}
				if got := m.server.PeerVersion(); got != strings.TrimRight(tt.line, "\r\n") {
					t.Errorf("version %q", got)
				}
				return
			}
			if err := m.fill(); err != nil {
				t.Fatal(err)
			}
			if got := string(m.in.buf[m.in.start:m.in.end]); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if err := m.end(); !errors.Is(err, ErrVersion) {
				t.Errorf("server: %v", err)
			}
		})
	}
}
