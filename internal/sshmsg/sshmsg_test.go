package sshmsg

import (
	"bytes"
	"reflect"
	"testing"

	"golang.org/x/crypto/ssh"
)

// The messages as package ssh encodes them, which is the reference.
type (
	refGlobalRequest struct {
		Type      string `sshtype:"80"`
		WantReply bool
		Data      []byte `ssh:"rest"`
	}
	refOpen struct {
		ChanType         string `sshtype:"90"`
		PeersID          uint32
		PeersWindow      uint32
		MaxPacketSize    uint32
		TypeSpecificData []byte `ssh:"rest"`
	}
	refConfirm struct {
		PeersID, MyID, MyWindow, MaxPacketSize uint32 `sshtype:"91"`
		TypeSpecificData                       []byte `ssh:"rest"`
	}
	refFailure struct {
		PeersID  uint32 `sshtype:"92"`
		Reason   uint32
		Message  string
		Language string
	}
	refAdjust struct {
		PeersID         uint32 `sshtype:"93"`
		AdditionalBytes uint32
	}
	refData struct {
		PeersID uint32 `sshtype:"94"`
		Data    []byte
	}
	refExtended struct {
		PeersID, Code uint32 `sshtype:"95"`
		Data          []byte
	}
	refRequest struct {
		PeersID   uint32 `sshtype:"98"`
		Request   string
		WantReply bool
		Data      []byte `ssh:"rest"`
	}
)

type appender interface{ Append([]byte) []byte }

func TestMessages(t *testing.T) {
	tests := []struct {
		name  string
		want  appender
		ref   any
		parse func([]byte) (any, error)
	}{
		{"global request", GlobalRequest{"tcpip-forward", true, []byte{1, 2}}, refGlobalRequest{"tcpip-forward", true, []byte{1, 2}}, parser(ParseGlobalRequest)},
		{"open", Open{"session", 7, 1 << 20, 1 << 15, []byte{}}, refOpen{"session", 7, 1 << 20, 1 << 15, nil}, parser(ParseOpen)},
		{"confirmation", OpenConfirm{1, 2, 3, 4, []byte{5}}, refConfirm{1, 2, 3, 4, []byte{5}}, parser(ParseOpenConfirm)},
		{"failure", OpenFailure{1, Prohibited, "no"}, refFailure{1, 1, "no", ""}, parser(ParseOpenFailure)},
		{"adjust", WindowAdjust{1, 2}, refAdjust{1, 2}, parser(ParseWindowAdjust)},
		{"data", Data{Recipient: 3, Data: []byte("hello")}, refData{3, []byte("hello")}, parser(ParseData)},
		{"stderr", Data{3, true, Stderr, []byte("oh")}, refExtended{3, 1, []byte("oh")}, parser(ParseData)},
		{"request", Request{9, "exec", true, []byte("x")}, refRequest{9, "exec", true, []byte("x")}, parser(ParseRequest)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			packet := test.want.Append(nil)
			if ref := ssh.Marshal(test.ref); !bytes.Equal(packet, ref) {
				t.Fatalf("encoded as\n%x, package ssh says\n%x", packet, ref)
			}
			got, err := test.parse(packet)
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Fatalf("parsed as %+v, %v; want %+v", got, err, test.want)
			}
			// No prefix of a message is a message, unless its last field is
			// the rest of the packet or may be missing.
			for n := range packet {
				test.parse(packet[:n])
			}
			if _, err := test.parse(packet[:4]); err == nil {
				t.Error("a message that is cut short was parsed")
			}
			wrong := bytes.Clone(packet)
			wrong[0] = NumEOF
			if _, err := test.parse(wrong); err == nil {
				t.Error("a message of another number was parsed")
			}
		})
	}
}

func parser[M any](parse func([]byte) (M, error)) func([]byte) (any, error) {
	return func(p []byte) (any, error) { return parse(p) }
}

// TestLengths parses lengths beyond the end of the message, and messages that are too
// long.
func TestLengths(t *testing.T) {
	for _, length := range []uint32{5, 1 << 16, 1 << 31, 1<<32 - 1} {
		packet := AppendUint32([]byte{NumGlobalRequest}, length)
		if m, err := ParseGlobalRequest(append(packet, "four"...)); err == nil {
			t.Errorf("length %d of a string of 4 bytes: parsed as %+v", length, m)
		}
		if m, err := ParseString(append(AppendUint32(nil, length), "four"...)); err == nil {
			t.Errorf("length %d of a payload of 4 bytes: parsed as %q", length, m)
		}
	}
	if _, err := ParseWindowAdjust(append(WindowAdjust{1, 2}.Append(nil), 0)); err == nil {
		t.Error("bytes behind the last field were accepted")
	}
	if _, err := ParseRecipient(nil); err == nil {
		t.Error("an empty packet was accepted")
	}
}

func TestRecipient(t *testing.T) {
	packet := Data{Recipient: 3, Data: []byte("x")}.Append(nil)
	SetRecipient(packet, 0x01020304)
	if n, err := Recipient(packet); n != 0x01020304 || err != nil {
		t.Errorf("recipient %x, %v", n, err)
	}
	if m, _ := ParseData(packet); m.Recipient != 0x01020304 || string(m.Data) != "x" {
		t.Errorf("got %+v", m)
	}
	if _, err := Recipient(packet[:4]); err == nil {
		t.Error("a packet of four bytes has a recipient")
	}
}

func TestPayloads(t *testing.T) {
	tcpip := TCPIP{"db.internal", 5432, "127.0.0.1", 50000}
	if got, err := ParseTCPIP(tcpip.Append(nil)); got != tcpip || err != nil {
		t.Errorf("tcpip %+v, %v", got, err)
	}
	if got, err := ParseListen(Listen{"", 8080}.Append(nil)); got != (Listen{"", 8080}) || err != nil {
		t.Errorf("listen %+v, %v", got, err)
	}
	path := ssh.Marshal(struct {
		Path, Reserved string
		Port           uint32
	}{"/run/x", "", 0})
	if got, err := ParseStreamlocal(path); got != "/run/x" || err != nil {
		t.Errorf("streamlocal %q, %v", got, err)
	}
	pty := ssh.Marshal(struct {
		Term       string
		C, R, W, H uint32
		Modes      string
	}{"xterm", 80, 24, 640, 480, "\x00"})
	if got, err := ParsePTY(pty); got.Term != "xterm" || got.Columns != 80 || got.Height != 480 || len(got.Modes) != 1 || err != nil {
		t.Errorf("pty %+v, %v", got, err)
	}
	x11 := ssh.Marshal(struct {
		Single           bool
		Protocol, Cookie string
		Screen           uint32
	}{true, "MIT-MAGIC-COOKIE-1", "abc", 2})
	if got, err := ParseX11Request(x11); got != (X11Request{true, "MIT-MAGIC-COOKIE-1", "abc", 2}) || err != nil {
		t.Errorf("x11 %+v, %v", got, err)
	}
	signal := ssh.Marshal(struct {
		Name      string
		Core      bool
		Text, Tag string
	}{"TERM", false, "ended", ""})
	if got, err := ParseExitSignal(signal); got != (ExitSignal{"TERM", false, "ended"}) || err != nil {
		t.Errorf("exit-signal %+v, %v", got, err)
	}
	if !bytes.Equal(ExitSignal{"TERM", false, "ended"}.Append(nil), signal) {
		t.Error("exit-signal is encoded otherwise than by package ssh")
	}
	env := ssh.Marshal(struct{ Name, Value string }{"LANG", "C"})
	if name, value, err := ParseEnv(env); name != "LANG" || value != "C" || err != nil {
		t.Errorf("env %q=%q, %v", name, value, err)
	}
	if got, err := ParseBreak([]byte{0, 0, 1, 0xf4}); got != 500 || err != nil {
		t.Errorf("break of %d ms, %v", got, err)
	}
	if got, err := ParseX11(X11{"::1", 9}.Append(nil)); got != (X11{"::1", 9}) || err != nil {
		t.Errorf("x11 %+v, %v", got, err)
	}
	if got, err := ParseStreamlocal(AppendForwardedStreamlocal(nil, "/s")); got != "/s" || err != nil {
		t.Errorf("forwarded-streamlocal %q, %v", got, err)
	}
	if got, err := ParseListenReply(AppendListenReply(nil, 9)); got != 9 || err != nil {
		t.Errorf("port %d, %v", got, err)
	}
	if got, err := ParseExitStatus(AppendExitStatus(nil, 255)); got != 255 || err != nil {
		t.Errorf("exit-status %d, %v", got, err)
	}
}

// FuzzMessages has every parser read the packet: none may panic, and a message
// that is parsed is the same when it is encoded and parsed again.
func FuzzMessages(f *testing.F) {
	f.Add(Open{"direct-tcpip", 1, 2, 3, TCPIP{"h", 1, "o", 2}.Append(nil)}.Append(nil))
	f.Add(Request{1, "exec", true, AppendString(nil, "true")}.Append(nil))
	f.Add(Data{1, true, 1, []byte("x")}.Append(nil))
	f.Add([]byte{NumRequest, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, packet []byte) {
		for _, parse := range []func([]byte) (any, error){
			parser(ParseGlobalRequest), parser(ParseOpen), parser(ParseOpenConfirm), parser(ParseOpenFailure),
			parser(ParseWindowAdjust), parser(ParseData), parser(ParseRequest),
		} {
			m, err := parse(packet)
			if err != nil {
				continue
			}
			again, err := parse(m.(appender).Append(nil))
			if err != nil || !reflect.DeepEqual(m, again) {
				t.Errorf("%+v, encoded and parsed again: %+v, %v", m, again, err)
			}
		}
		ParseRecipient(packet)
		Recipient(packet)
		for _, parse := range []func([]byte) (any, error){
			parser(ParseTCPIP), parser(ParseStreamlocal), parser(ParseX11), parser(ParseListen), parser(ParseListenReply),
			parser(ParseListenStreamlocal), parser(ParsePTY), parser(ParseWindowChange), parser(ParseString),
			parser(ParseX11Request), parser(ParseExitStatus), parser(ParseExitSignal), parser(ParseBreak),
			func(p []byte) (any, error) { name, _, err := ParseEnv(p); return name, err },
		} {
			parse(packet)
		}
	})
}
