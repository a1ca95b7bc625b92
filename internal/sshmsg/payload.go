package sshmsg

import (
	"net"
	"strconv"
)

// The payloads of channel types, channel requests and global requests. Their
// parsers copy strings.

// Channel types.
const (
	TypeSession              = "session"
	TypeDirectTCPIP          = "direct-tcpip"
	TypeForwardedTCPIP       = "forwarded-tcpip"
	TypeDirectStreamlocal    = "direct-streamlocal@openssh.com"
	TypeForwardedStreamlocal = "forwarded-streamlocal@openssh.com"
	TypeX11                  = "x11"
	TypeAgent                = "auth-agent@openssh.com"
	TypeTun                  = "tun@openssh.com"
)

// Global requests.
const (
	Keepalive               = "keepalive@openssh.com" // a channel request as well
	NoMoreSessions          = "no-more-sessions@openssh.com"
	HostKeys                = "hostkeys-00@openssh.com"
	HostKeysProve           = "hostkeys-prove-00@openssh.com"
	ListenTCPIP             = "tcpip-forward"
	CancelListenTCPIP       = "cancel-tcpip-forward"
	ListenStreamlocal       = "streamlocal-forward@openssh.com"
	CancelListenStreamlocal = "cancel-streamlocal-forward@openssh.com"
)

// Channel requests.
const (
	RequestPTY          = "pty-req"
	RequestX11          = "x11-req"
	RequestEnv          = "env"
	RequestShell        = "shell"
	RequestExec         = "exec"
	RequestSubsystem    = "subsystem"
	RequestWindowChange = "window-change"
	RequestSignal       = "signal"
	RequestBreak        = "break"
	RequestExitStatus   = "exit-status"
	RequestExitSignal   = "exit-signal"
	RequestEndOfWrite   = "eow@openssh.com"
	RequestAgent        = "auth-agent-req@openssh.com"
)

// HostPort returns host and port as one string, such as "db.internal:5432" or
// "[::1]:22".
func HostPort(host string, port uint32) string {
	return net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10))
}

// A TCPIP opens direct-tcpip, which leads to Host and Port, or forwarded-tcpip,
// which comes from a listener there (RFC 4254, section 7.2).
type TCPIP struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

// ParseTCPIP parses the payload of an [Open].
func ParseTCPIP(payload []byte) (m TCPIP, err error) {
	r := NewReader(payload)
	m.Host, m.Port, m.OriginHost, m.OriginPort = r.String(), r.Uint32(), r.String(), r.Uint32()
	return m, r.End()
}

// Append appends the payload to b.
func (m TCPIP) Append(b []byte) []byte {
	b = AppendUint32(AppendString(b, m.Host), m.Port)
	return AppendUint32(AppendString(b, m.OriginHost), m.OriginPort)
}

// ParseStreamlocal parses the payload of an [Open] of direct-streamlocal or
// forwarded-streamlocal and returns the socket's path. It skips the reserved fields
// behind the path (OpenSSH PROTOCOL, section 2.4).
func ParseStreamlocal(payload []byte) (path string, err error) {
	r := NewReader(payload)
	path = r.String()
	r.Remainder()
	return path, r.End()
}

// AppendForwardedStreamlocal appends the payload of an [Open] of
// forwarded-streamlocal to b.
func AppendForwardedStreamlocal(b []byte, path string) []byte {
	return AppendString(AppendString(b, path), "")
}

// An X11 opens a channel of type x11 (RFC 4254, section 6.3.2).
type X11 struct {
	OriginHost string
	OriginPort uint32
}

// ParseX11 parses the payload of an [Open].
func ParseX11(payload []byte) (m X11, err error) {
	r := NewReader(payload)
	m.OriginHost, m.OriginPort = r.String(), r.Uint32()
	return m, r.End()
}

// Append appends the payload to b.
func (m X11) Append(b []byte) []byte {
	return AppendUint32(AppendString(b, m.OriginHost), m.OriginPort)
}

// A Listen is the payload of tcpip-forward and of its cancellation (RFC 4254,
// section 7.1). Port 0 asks the server to choose.
type Listen struct {
	Host string
	Port uint32
}

// ParseListen parses the payload of a [GlobalRequest].
func ParseListen(payload []byte) (m Listen, err error) {
	r := NewReader(payload)
	m.Host, m.Port = r.String(), r.Uint32()
	return m, r.End()
}

// Append appends the payload to b.
func (m Listen) Append(b []byte) []byte { return AppendUint32(AppendString(b, m.Host), m.Port) }

// ParseListenReply parses the payload of the reply to a Listen with port 0: the port
// that the server chose.
func ParseListenReply(payload []byte) (port uint32, err error) {
	r := NewReader(payload)
	port = r.Uint32()
	return port, r.End()
}

// AppendListenReply appends that payload to b.
func AppendListenReply(b []byte, port uint32) []byte { return AppendUint32(b, port) }

// ParseListenStreamlocal parses the payload of streamlocal-forward and of its
// cancellation (OpenSSH PROTOCOL, section 2.4).
func ParseListenStreamlocal(payload []byte) (path string, err error) {
	return ParseString(payload)
}

// A PTY is the payload of pty-req (RFC 4254, section 6.2). Modes is not a copy.
type PTY struct {
	Term                         string
	Columns, Rows, Width, Height uint32 // the last two in pixels
	Modes                        []byte
}

// ParsePTY parses the payload of a [Request].
func ParsePTY(payload []byte) (m PTY, err error) {
	r := NewReader(payload)
	m.Term, m.Columns, m.Rows, m.Width, m.Height, m.Modes = r.String(), r.Uint32(), r.Uint32(), r.Uint32(), r.Uint32(), r.Bytes()
	return m, r.End()
}

// A WindowChange is the payload of window-change (RFC 4254, section 6.7).
type WindowChange struct{ Columns, Rows, Width, Height uint32 }

// ParseWindowChange parses the payload of a [Request].
func ParseWindowChange(payload []byte) (m WindowChange, err error) {
	r := NewReader(payload)
	m.Columns, m.Rows, m.Width, m.Height = r.Uint32(), r.Uint32(), r.Uint32(), r.Uint32()
	return m, r.End()
}

// ParseString parses a payload that is one string, such as that of exec,
// subsystem and signal (RFC 4254, sections 6.5 and 6.9). AppendString encodes it.
func ParseString(payload []byte) (s string, err error) {
	r := NewReader(payload)
	s = r.String()
	return s, r.End()
}

// ParseEnv parses the payload of env (RFC 4254, section 6.4).
func ParseEnv(payload []byte) (name, value string, err error) {
	r := NewReader(payload)
	name, value = r.String(), r.String()
	return name, value, r.End()
}

// ParseBreak parses the payload of break (RFC 4335, section 3), which is its length.
func ParseBreak(payload []byte) (milliseconds uint32, err error) {
	r := NewReader(payload)
	milliseconds = r.Uint32()
	return milliseconds, r.End()
}

// An X11Request is the payload of x11-req (RFC 4254, section 6.3.1).
type X11Request struct {
	Single           bool
	Protocol, Cookie string
	Screen           uint32
}

// ParseX11Request parses the payload of a [Request].
func ParseX11Request(payload []byte) (m X11Request, err error) {
	r := NewReader(payload)
	m.Single, m.Protocol, m.Cookie, m.Screen = r.Bool(), r.String(), r.String(), r.Uint32()
	return m, r.End()
}

// ParseExitStatus parses the payload of exit-status (RFC 4254, section 6.10).
func ParseExitStatus(payload []byte) (status uint32, err error) {
	r := NewReader(payload)
	status = r.Uint32()
	return status, r.End()
}

// AppendExitStatus appends that payload to b.
func AppendExitStatus(b []byte, status uint32) []byte { return AppendUint32(b, status) }

// An ExitSignal is the payload of exit-signal (RFC 4254, section 6.10).
type ExitSignal struct {
	Name       string // without SIG
	CoreDumped bool
	Message    string
}

// ParseExitSignal parses the payload of a [Request].
func ParseExitSignal(payload []byte) (m ExitSignal, err error) {
	r := NewReader(payload)
	m.Name, m.CoreDumped, m.Message = r.String(), r.Bool(), r.String()
	r.Bytes() // language tag
	return m, r.End()
}

// Append appends the payload to b.
func (m ExitSignal) Append(b []byte) []byte {
	b = AppendBool(AppendString(b, m.Name), m.CoreDumped)
	return AppendString(AppendString(b, m.Message), "")
}
