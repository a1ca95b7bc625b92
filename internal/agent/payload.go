package agent

import (
	"encoding/binary"
	"errors"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// The parsers in this file return an error for payloads that are well-formed (package
// sshmsg) and cannot be served, such as a path with a NUL. All payloads are untrusted.

var errMalformed = errors.New("malformed payload")

func parsePTYRequest(payload []byte) (sshmsg.PTY, error) {
	r, err := sshmsg.ParsePTY(payload)
	if err == nil && (len(r.Term) > 256 || strings.ContainsRune(r.Term, 0)) {
		err = errMalformed
	}
	return r, err
}

// parseX11Request accepts the same strings as OpenSSH's xauth_valid_string, because protocol
// and cookie become words of a command for xauth.
func parseX11Request(payload []byte) (sshmsg.X11Request, error) {
	r, err := sshmsg.ParseX11Request(payload)
	if err == nil && (!validXauth(r.Protocol) || !validXauth(r.Cookie) || r.Screen > 1<<16) {
		err = errMalformed
	}
	return r, err
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

// parseEnvRequest rejects invalid environment variables.
func parseEnvRequest(payload []byte) (name, value string, err error) {
	name, value, err = sshmsg.ParseEnv(payload)
	if err == nil && (name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0)) {
		err = errMalformed
	}
	return name, value, err
}

// parseCommand reads the payload of exec, subsystem or signal. It rejects a NUL, which would
// truncate the command after it has been checked and logged.
func parseCommand(payload []byte) (string, error) {
	command, err := sshmsg.ParseString(payload)
	if err == nil && strings.ContainsRune(command, 0) {
		err = errMalformed
	}
	return command, err
}

func parseListen(payload []byte) (sshmsg.Listen, error) {
	r, err := sshmsg.ParseListen(payload)
	if err == nil && (r.Port > 65535 || strings.ContainsRune(r.Host, 0)) {
		err = errMalformed
	}
	return r, err
}

func parseDirectTCP(payload []byte) (sshmsg.TCPIP, error) {
	r, err := sshmsg.ParseTCPIP(payload)
	if err == nil && (r.Port > 65535 || r.OriginPort > 65535 || strings.ContainsRune(r.Host, 0)) {
		err = errMalformed
	}
	return r, err
}

func parseListenStreamlocal(payload []byte) (path string, err error) {
	if path, err = sshmsg.ParseListenStreamlocal(payload); err == nil {
		err = checkSocketPath(path)
	}
	return path, err
}

func parseDirectStreamlocal(payload []byte) (path string, err error) {
	if path, err = sshmsg.ParseStreamlocal(payload); err == nil {
		err = checkSocketPath(path)
	}
	return path, err
}

func checkSocketPath(path string) error {
	if path == "" || strings.ContainsRune(path, 0) {
		return errMalformed
	}
	return nil
}

// A terminalMode is an element of the encoded terminal modes.
type terminalMode struct {
	Opcode byte
	Value  uint32
}

// parseModes reads the encoded terminal modes of a pty-req (RFC 4254 section 8). As the RFC
// requires, it stops at the first opcode of unknown length (160 to 255). TTY_OP_END at the
// end may be missing.
func parseModes(encoded []byte) ([]terminalMode, error) {
	var modes []terminalMode
	for b := encoded; len(b) > 0 && b[0] != 0 && b[0] < 160; b = b[5:] {
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
