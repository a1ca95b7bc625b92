package agent

import (
	"encoding/binary"
	"errors"
	"strings"

	"golang.org/x/crypto/ssh"
)

// The payloads of RFC 4254 and of OpenSSH's PROTOCOL file, as ssh.Unmarshal
// reads them. Everything in them comes from outside.
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
	exitSignal          struct {
		Signal     string
		CoreDumped bool
		Message    string
		Language   string
	}

	// tcpAddr is the payload of "tcpip-forward" and of its cancellation
	// (section 7.1), and the originator in channel opens.
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
	// forwardedStreamlocal opens "forwarded-streamlocal@openssh.com".
	forwardedStreamlocal struct{ Path, Reserved string }
)

var errMalformed = errors.New("malformed payload")

func parsePTYRequest(payload []byte) (ptyRequest, error) {
	var r ptyRequest
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return ptyRequest{}, err
	}
	if len(r.Term) > 256 || strings.ContainsRune(r.Term, 0) {
		return ptyRequest{}, errMalformed
	}
	return r, nil
}

// parseX11Request accepts what OpenSSH's xauth_valid_string does: protocol and
// cookie become words of xauth's command language.
func parseX11Request(payload []byte) (x11Request, error) {
	var r x11Request
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return x11Request{}, err
	}
	if !validXauth(r.Protocol) || !validXauth(r.Cookie) || r.Screen > 1<<16 {
		return x11Request{}, errMalformed
	}
	return r, nil
}

func validXauth(s string) bool {
	if s == "" || len(s) > 1024 || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte(".:/-_", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// parseEnvRequest refuses what could not be an environment variable.
func parseEnvRequest(payload []byte) (name, value string, err error) {
	var r envRequest
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return "", "", err
	}
	if r.Name == "" || strings.ContainsAny(r.Name, "=\x00") || strings.ContainsRune(r.Value, 0) {
		return "", "", errMalformed
	}
	return r.Name, r.Value, nil
}

// parseCommand reads the payload of exec, subsystem or signal. A NUL would cut
// the command short after it was checked and logged.
func parseCommand(payload []byte) (string, error) {
	var r commandRequest
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return "", err
	}
	if strings.ContainsRune(r.Command, 0) {
		return "", errMalformed
	}
	return r.Command, nil
}

func parseTCPAddr(payload []byte) (tcpAddr, error) {
	var r tcpAddr
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return tcpAddr{}, err
	}
	if r.Port > 65535 || strings.ContainsRune(r.Host, 0) {
		return tcpAddr{}, errMalformed
	}
	return r, nil
}

func parseDirectTCP(payload []byte) (directTCP, error) {
	var r directTCP
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return directTCP{}, err
	}
	if r.Port > 65535 || r.OriginPort > 65535 || strings.ContainsRune(r.Host, 0) {
		return directTCP{}, errMalformed
	}
	return r, nil
}

func parseStreamlocal(payload []byte) (string, error) {
	var r streamlocalAddr
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return "", err
	}
	return r.Path, checkSocketPath(r.Path)
}

func parseDirectStreamlocal(payload []byte) (string, error) {
	var r directStreamlocal
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return "", err
	}
	return r.Path, checkSocketPath(r.Path)
}

func checkSocketPath(path string) error {
	if path == "" || strings.ContainsRune(path, 0) {
		return errMalformed
	}
	return nil
}

// A terminalMode is one pair of an encoded terminal mode string.
type terminalMode struct {
	Opcode byte
	Value  uint32
}

// parseModes reads the encoded terminal modes of a pty-req (RFC 4254 section
// 8). As the RFC asks, it stops at the first opcode it cannot know the length
// of (160 to 255), and takes a missing TTY_OP_END for one.
func parseModes(encoded string) ([]terminalMode, error) {
	var modes []terminalMode
	for b := []byte(encoded); len(b) > 0 && b[0] != 0 && b[0] < 160; b = b[5:] {
		if len(b) < 5 {
			return nil, errMalformed
		}
		modes = append(modes, terminalMode{b[0], binary.BigEndian.Uint32(b[1:])})
		if len(modes) > 256 {
			return nil, errMalformed
		}
	}
	return modes, nil
}
