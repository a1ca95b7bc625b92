package agent

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// FuzzPayloads checks the payloads that each parser accepts.
func FuzzPayloads(f *testing.F) {
	f.Add([]byte{})
	f.Add(ssh.Marshal(ptyRequest{"xterm", 80, 24, 0, 0, "\x03\x00\x00\x00\x7f\x00"}))
	f.Add(ssh.Marshal(x11Request{true, "MIT-MAGIC-COOKIE-1", "00ff", 0}))
	f.Add(ssh.Marshal(envRequest{"LANG", "C.UTF-8"}))
	f.Add(ssh.Marshal(commandRequest{"true"}))
	f.Add(ssh.Marshal(tcpAddr{"localhost", 0}))
	f.Add(ssh.Marshal(directTCP{"localhost", 22, "127.0.0.1", 1}))
	f.Add(ssh.Marshal(streamlocalAddr{"/tmp/s"}))
	f.Add(ssh.Marshal(directStreamlocal{"/tmp/s", "", 0}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if r, err := parsePTYRequest(payload); err == nil && strings.ContainsRune(r.Term, 0) {
			t.Errorf("TERM %q", r.Term)
		}
		if r, err := parseX11Request(payload); err == nil && strings.ContainsAny(r.Protocol+r.Cookie, " \n\t\"'#\\") {
			t.Errorf("xauth words %q %q", r.Protocol, r.Cookie)
		}
		if name, value, err := parseEnvRequest(payload); err == nil && (name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0)) {
			t.Errorf("variable %q=%q", name, value)
		}
		if command, err := parseCommand(payload); err == nil && strings.ContainsRune(command, 0) {
			t.Errorf("command %q", command)
		}
		if r, err := parseListen(payload); err == nil && r.Port > 65535 {
			t.Errorf("port %d", r.Port)
		}
		if r, err := parseDirectTCP(payload); err == nil && r.Port > 65535 {
			t.Errorf("port %d", r.Port)
		}
		for _, parse := range []func([]byte) (string, error){parseListenStreamlocal, parseDirectStreamlocal} {
			if path, err := parse(payload); err == nil && (path == "" || strings.ContainsRune(path, 0)) {
				t.Errorf("path %q", path)
			}
		}
	})
}

func FuzzModes(f *testing.F) {
	f.Add("")
	f.Add("\x03\x00\x00\x00\x7f\x81\x00\x00\x96\x00\x00")
	f.Add("\x2a\x00\x00\x00\x01\xa0\x00")
	f.Fuzz(func(t *testing.T, encoded string) {
		modes, err := parseModes([]byte(encoded))
		if err == nil && len(modes)*5 > len(encoded) {
			t.Errorf("%d modes in %d bytes", len(modes), len(encoded))
		}
		var tio unix.Termios
		for _, m := range modes {
			applyMode(&tio, m)
		}
	})
}

func FuzzEnvironmentFile(f *testing.F) {
	f.Add("PATH=\"/bin\"\n# comment\nexport A='b'\n")
	f.Add("A=1\\\n# comment\n  2\nB=1\nA\nB=\n")
	f.Fuzz(func(t *testing.T, text string) {
		var env environ
		env.readPAM(strings.NewReader(text))
		seen := map[string]bool{}
		for _, p := range env.vars {
			name, value, ok := strings.Cut(p, "=")
			if !ok || name == "" || strings.Trim(name, nameChars) != "" || seen[name] || strings.ContainsAny(value, "\x00\n#") {
				t.Errorf("pair %q", p)
			}
			seen[name] = true
		}
	})
}

// Payloads of RFC 4254 and of OpenSSH's PROTOCOL, for ssh.Marshal.
type (
	// ptyRequest is the payload of "pty-req" (RFC 4254 section 6.2).
	ptyRequest struct {
		Term                         string
		Cols, Rows, XPixels, YPixels uint32
		Modes                        string
	}
	// x11Request is the payload of "x11-req" (section 6.3.1).
	x11Request struct {
		SingleConnection bool
		Protocol, Cookie string
		Screen           uint32
	}
	envRequest          struct{ Name, Value string }
	commandRequest      struct{ Command string } // of exec, subsystem and signal
	windowChangeRequest struct{ Cols, Rows, XPixels, YPixels uint32 }
	breakRequest        struct{ Milliseconds uint32 } // RFC 4335 section 3
	exitStatus          struct{ Status uint32 }

	// tcpAddr is the payload of "tcpip-forward" and "cancel-tcpip-forward" (section
	// 7.1).
	tcpAddr struct {
		Host string
		Port uint32
	}
	// directTCP opens "direct-tcpip" and "forwarded-tcpip" (section 7.2).
	directTCP struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	// streamlocalAddr is the payload of "streamlocal-forward@openssh.com".
	streamlocalAddr struct{ Path string }
	// directStreamlocal opens "direct-streamlocal@openssh.com".
	directStreamlocal struct {
		Path     string
		Reserved string
		Port     uint32
	}
)
