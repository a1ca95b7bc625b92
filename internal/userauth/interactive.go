package userauth

import (
	"errors"
	"fmt"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

// A Prompt is one question of keyboard-interactive. Echo says whether the client shows
// the answer while the user types it.
type Prompt struct {
	Text string
	Echo bool
}

// ErrAbandoned says that the client has sent another request in place of the answers
// (RFC 4252 section 5.1). [Server.Next] returns that request. The abandoned one needs
// no answer.
var ErrAbandoned = errors.New("keyboard-interactive abandoned")

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 1024

// Ask sends an INFO_REQUEST and returns the answers, one for each prompt (RFC 4256
// sections 3.2 to 3.4). Without prompts, the client shows name and instruction, and
// there are no answers.
//
// The error is ErrAbandoned, wraps ErrRequest, or is one of
// [transport.Conn.ReadPacket].
func (s *Server) Ask(name, instruction string, prompts ...Prompt) ([]string, error) {
	b := sshmsg.AppendString([]byte{msgInfoRequest}, name)
	b = sshmsg.AppendString(b, instruction)
	b = sshmsg.AppendString(b, "") // language
	b = sshmsg.AppendUint32(b, uint32(len(prompts)))
	for _, p := range prompts {
		b = sshmsg.AppendBool(sshmsg.AppendString(b, p.Text), p.Echo)
	}
	if err := s.send(b); err != nil {
		return nil, err
	}
	p, err := s.c.ReadPacket()
	if err != nil {
		return nil, err
	}
	switch p[0] {
	case msgInfoResponse:
	case msgRequest:
		s.readAhead = append([]byte(nil), p...)
		return nil, ErrAbandoned
	default:
		return nil, s.disconnect(transport.ReasonProtocolError, fmt.Sprintf("unexpected message %d during authentication", p[0]))
	}
	f := sshmsg.NewReader(p[1:])
	if n := f.Uint32(); f.Failed() || uint64(n) != uint64(len(prompts)) {
		return nil, s.disconnect(transport.ReasonProtocolError, "wrong number of answers")
	}
	answers := make([]string, len(prompts))
	tooLong := false
	for i := range answers {
		answers[i] = f.String()
		tooLong = tooLong || len(answers[i]) > maxAnswer
	}
	if f.End() != nil || tooLong {
		return nil, s.disconnect(transport.ReasonProtocolError, "malformed answers")
	}
	return answers, nil
}
