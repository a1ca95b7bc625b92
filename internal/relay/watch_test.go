package relay

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A logWatcher writes down the calls, and fails those of the kinds in fail.
type logWatcher struct {
	taps *Taps
	fail map[string]error
	log  []string
}

func (w *logWatcher) add(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

// want compares the calls so far.
func (w *logWatcher) want(t *testing.T, calls ...string) {
	t.Helper()
	synctest.Wait()
	if got, want := strings.Join(w.log, "\n"), strings.Join(calls, "\n"); got != want {
		t.Errorf("the watcher was told\n%s\nwant\n%s", got, want)
	}
}

func (w *logWatcher) Open(o Opening) (ChannelWatcher, error) {
	w.add("open %d %s %v", o.Number, o.Kind, o.FromClient)
	if err := w.fail["open"]; err != nil {
		return nil, err
	}
	return w, nil
}

func (w *logWatcher) Granted(kind string, fromClient bool, payload, reply []byte) error {
	w.add("granted %s %v %q %q", kind, fromClient, payload, reply)
	return w.fail[kind]
}

func (w *logWatcher) Refused(r Refusal) {
	w.add("refused %s %v channel %d global %v far %v %d %q", r.Kind, r.FromClient, r.Channel, r.Global, r.ByFar, r.Code, r.Why)
}

func (w *logWatcher) Taps() *Taps { return w.taps }

func (w *logWatcher) Request(kind string, fromClient bool, payload []byte) error {
	w.add("request %s %v %q", kind, fromClient, payload)
	return w.fail[kind]
}

func (w *logWatcher) Answered(kind string, fromClient bool, payload []byte, ok bool) {
	w.add("answered %s %v %v", kind, fromClient, ok)
}

func (w *logWatcher) End(toBastion, toClient int64, lost bool) {
	w.add("end %d %d %v", toBastion, toClient, lost)
}

func watched() (*Relay, *logWatcher) {
	r, w := permitAll(), &logWatcher{fail: make(map[string]error)}
	r.Watch = w
	return r, w
}

// TestWatch follows a session with taps on both ways.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := watched()
		w.taps = &Taps{
			ToClient:  func(p []byte, stderr bool) error { w.add("shown %s %v", p, stderr); return nil },
			ToBastion: func(p []byte, stderr bool) error { w.add("typed %s %v", p, stderr); return nil },
		}
		j := join(t, r)
		defer j.end()
		j.session()
		j.bastion.send(data(0, "early"))
		synctest.Wait()
		j.client.send(request(0, "shell", true, ""), data(0, "input"))
		synctest.Wait()
		j.bastion.send(success(0), data(0, "output"), stderr(0, "error"), exitStatus(0, 3), closing(0))
		synctest.Wait()
		j.client.send(closing(0))
		w.want(t, `open 0 session true`, `shown early false`, `request shell true ""`, `typed input false`, `answered shell true true`,
			`shown output false`, `shown error true`, `request exit-status false "\x00\x00\x00\x03"`, `end 5 16 false`)
	})
}

// TestWatchRefusals names each refusal and which side has refused.
func TestWatchRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := watched()
		r.Permissions.PTY = false
		r.MaxSessions = 1
		j := join(t, r)
		defer j.end()
		j.session()
		j.client.send(request(0, "pty-req", true, pty), request(0, "exec", true, execTrue), open("session", 41, ""), open("other", 42, ""),
			global("tcpip-forward", true, listenAt("", 1)), global("tcpip-forward", true, listenAt("", 2)))
		synctest.Wait()
		j.bastion.send(failure(0), openFailure(1, 1, "not there"), requestFailure, append(requestSuccess, 'p'))
		w.want(t, `open 0 session true`,
			`refused pty-req true channel 0 global false far false 1 "a terminal is not permitted for this key"`,
			`request exec true "\x00\x00\x00\x04true"`,
			`refused session true channel -1 global false far false 4 "too many sessions on this connection"`,
			`answered exec true false`,
			`refused other true channel -1 global false far true 1 "not there"`,
			`refused tcpip-forward true channel -1 global true far true 1 ""`,
			`granted tcpip-forward true "\x00\x00\x00\x00\x00\x00\x00\x02" "p"`)
	})
}

// TestWatchForbids lets nothing happen that the watcher cannot write down, and tells
// the user why.
func TestWatchForbids(t *testing.T) {
	why := errors.New("It cannot be written down.")
	told := [][]byte{stderr(40, "\r\nIt cannot be written down.\r\n"), exitStatus(40, 255), eof(40), closing(40)}
	t.Run("open", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			w.fail["open"] = why
			j := join(t, r)
			defer j.end()
			j.client.send(open("other", 40, ""))
			j.bastion.got()
			j.bastion.send(confirm(0, 70), data(0, "x"))
			j.client.want("client", openFailure(40, sshmsg.ConnectFailed, why.Error()))
			j.bastion.want("bastion", closing(70))
			j.bastion.send(closing(0))
			j.counts(0, 0, 0)
		})
	})
	t.Run("global", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			w.fail["odd@example.com"] = why
			j := join(t, r)
			defer j.end()
			j.client.send(global("odd@example.com", true, ""), global("odd@example.com", false, ""))
			j.bastion.want("bastion", global("odd@example.com", true, ""))
			j.bastion.send(requestSuccess)
			j.client.want("client", requestFailure)
		})
	})
	t.Run("request", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			w.fail["exec"] = why
			j := join(t, r)
			defer j.end()
			j.session()
			j.client.send(request(0, "exec", true, execTrue), data(0, "x"))
			// A client that is told of a failure leaves before it has read why.
			j.client.want("client", append([][]byte{success(40)}, told...)...)
			j.bastion.want("bastion", closing(70))
		})
	})
	t.Run("early request", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			w.fail["exec"] = why
			j := start(t, r)
			defer j.end()
			j.client.send(open("session", 40, ""))
			j.client.got()
			j.client.send(request(0, "exec", true, execTrue))
			j.client.want("client", append([][]byte{success(40)}, told...)...)
			j.arrive()
			j.bastion.want("bastion")
			w.want(t, `open 0 session true`, `request exec true "\x00\x00\x00\x04true"`, `end 0 0 false`)
		})
	})
	t.Run("early open", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			w.fail["open"] = why
			j := start(t, r)
			defer j.end()
			j.client.send(open("session", 40, ""))
			j.client.want("client", openFailure(40, sshmsg.ConnectFailed, why.Error()))
			j.counts(0, 0, 0)
		})
	})
}

// TestTapFails ends a session that cannot be recorded any more: the user is told why,
// and nothing passes from then on.
func TestTapFails(t *testing.T) {
	for _, by := range []string{"client", "bastion"} {
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, w := watched()
				fails := func(p []byte, _ bool) error {
					if strings.Contains(string(p), "full") {
						return errors.New("The disk is full.")
					}
					return nil
				}
				w.taps = &Taps{ToClient: fails, ToBastion: fails}
				j := join(t, r)
				defer j.end()
				j.session()
				j.bastion.send(data(0, "seen"))
				j.client.want("client", data(40, "seen"))
				from := j.client
				if by == "bastion" {
					from = j.bastion
				}
				from.send(data(0, "full"))
				j.client.want("client", stderr(40, "\r\nThe disk is full.\r\n"), exitStatus(40, 255), eof(40), closing(40))
				j.bastion.want("bastion", closing(70))
				j.client.send(data(0, "rm -rf evidence\n"), request(0, "exec", true, execTrue), eof(0))
				j.bastion.send(data(0, "unseen"), exitStatus(0, 0), closing(0))
				j.client.want("client")
				j.bastion.want("bastion")
				j.client.send(closing(0))
				j.counts(0, 0, 0)
			})
		})
	}
}

// TestTapFailsUnread is the same while the client reads nothing and its window is used
// up.
func TestTapFailsUnread(t *testing.T) {
	for _, then := range []string{"reads on", "closes"} {
		t.Run(then, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, w := watched()
				var full error
				w.taps = &Taps{ToClient: func([]byte, bool) error { return full }}
				j := join(t, r)
				defer j.end()
				j.session()
				j.bastion.send(data(0, strings.Repeat("x", 500)), data(0, strings.Repeat("x", 500)), data(0, ""))
				j.client.got()
				full = errors.New("full")
				j.bastion.send(data(0, ""))
				j.bastion.want("bastion", closing(70))
				j.client.want("client") // its window is used up
				j.client.send(data(0, "rm -rf evidence\n"))
				j.bastion.send(exitStatus(0, 0), closing(0))
				j.bastion.want("bastion")
				if then == "closes" {
					j.client.send(closing(0))
					j.client.want("client", exitStatus(40, 255), eof(40), closing(40))
				} else {
					j.client.send(adjust(0, 5))
					j.client.want("client", stderr(40, "\r\nful"))
					j.client.send(adjust(0, 500))
					j.client.want("client", stderr(40, "l\r\n"), exitStatus(40, 255), eof(40), closing(40))
					j.client.send(closing(0))
				}
				j.counts(0, 0, 0)
			})
		})
	}
}

// TestWatchLost tells a bastion that has gone from a client that has.
func TestWatchLost(t *testing.T) {
	for _, gone := range []string{"client", "bastion"} {
		synctest.Test(t, func(t *testing.T) {
			r, w := watched()
			j := join(t, r)
			j.session()
			if gone == "client" {
				j.client.hangUp()
			} else {
				j.bastion.hangUp()
			}
			<-j.done
			w.want(t, `open 0 session true`, fmt.Sprintf("end 0 0 %v", gone == "bastion"))
		})
	}
}

// TestWatchCommands: a bastion runs one command of a session. The watcher learns which one,
// also if the client wants no reply, or does not wait for it.
func TestWatchCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := watched()
		j := join(t, r)
		defer j.end()
		j.session()
		// The bastion is asked for a reply, and the client gets none.
		j.client.send(request(0, "exec", false, execTrue))
		j.bastion.want("bastion", request(70, "exec", true, execTrue))
		// Whether that is the command of the session is open, so there is no other one.
		j.client.send(request(0, "subsystem", true, sftpName), request(0, "shell", false, ""))
		j.bastion.want("bastion")
		j.client.want("client")
		j.bastion.send(failure(0))
		j.client.want("client", failure(40)) // to the subsystem
		j.client.send(request(0, "subsystem", true, sftpName))
		j.bastion.want("bastion", request(70, "subsystem", true, sftpName))
		j.bastion.send(success(0))
		j.client.want("client", success(40))
		j.client.send(request(0, "shell", true, "")) // the bastion refuses it
		j.bastion.want("bastion", request(70, "shell", true, ""))
		const undecided = `far false 1 "an earlier command of the session is not answered yet"`
		w.want(t, `open 0 session true`, `request exec true "\x00\x00\x00\x04true"`,
			`refused subsystem true channel 0 global false `+undecided,
			`refused shell true channel 0 global false `+undecided,
			`answered exec true false`, `request subsystem true "\x00\x00\x00\x04sftp"`, `answered subsystem true true`, `request shell true ""`)
	})
}

var sftpName = string(sshmsg.AppendString(nil, "sftp"))
