package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// codeHeader has the verification code of a user who needs one.
const codeHeader = "Sallyport-Code"

// A request is one request with its call and its answer.
type request struct {
	*http.Request
	server   *Server
	settings *Settings
	call     *gateway.Call
	w        http.ResponseWriter
	id       identity.Identity // zero before login
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &request{Request: r, server: s, settings: s.settings(), call: r.Context().Value(callKey{}).(*gateway.Call), w: w}
	defer func() {
		if p := recover(); p != nil {
			q.call.Crashed(p)
			q.fail(errPanic)
		}
	}()
	if r.ContentLength != 0 {
		// The server reads the rest of the body, after any answer, without a limit of
		// time.
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(time.Second))
	}
	if err := q.call.Penalty(); err != nil {
		q.fail(err)
		return
	}
	if r.ContentLength != 0 {
		q.call.Refuse("", r.UserAgent(), errBody)
		q.fail(errBody)
		return
	}
	s.routes.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestKey{}, q)))
}

// requestKey is the key of the request in its context.
type requestKey struct{}

var errPanic = errors.New("panic")

// newRoutes returns the handler of all paths.
func (s *Server) newRoutes() http.Handler {
	mux := http.NewServeMux()
	for _, route := range routes {
		mux.HandleFunc(route.pattern, func(_ http.ResponseWriter, r *http.Request) {
			q := r.Context().Value(requestKey{}).(*request)
			q.Request = r
			q.serve(route)
		})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler, pattern := mux.Handler(r)
		if pattern != "" && r.URL.Path == path.Clean(r.URL.Path) {
			mux.ServeHTTP(w, r)
			return
		}
		q := r.Context().Value(requestKey{}).(*request)
		err := errNoPath
		// The handler of the mux knows whether the path exists for other methods.
		answer := &headerOnly{header: http.Header{}}
		if handler.ServeHTTP(answer, r); answer.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", answer.header.Get("Allow"))
			err = errMethod
		}
		q.call.Refuse("", r.UserAgent(), err)
		q.fail(err)
	})
}

// headerOnly is a [http.ResponseWriter] that discards the body.
type headerOnly struct {
	header http.Header
	status int
}

func (h *headerOnly) Header() http.Header         { return h.header }
func (h *headerOnly) WriteHeader(status int)      { h.status = status }
func (h *headerOnly) Write(p []byte) (int, error) { return len(p), nil }

// A route is a method and a path, and the function that answers its requests.
type route struct {
	pattern string // of [http.ServeMux]
	serve   func(*request) error
	// params are the names of the query's parameters.
	params []string
	// public says that no login is needed.
	public bool
}

// serve logs the user in, writes the request to the audit log, and answers it.
func (q *request) serve(route route) {
	if route.public {
		q.call.Public()
	} else if err := q.login(); err != nil {
		q.fail(err)
		return
	}
	err := q.checkQuery(route.params)
	if err == nil && !route.public {
		err = q.call.Audit(audit.Event{Type: audit.Exec, Command: q.commandLine()})
	}
	if err == nil {
		err = route.serve(q)
	}
	if err != nil {
		q.fail(err)
	}
}

// commandLine is the request in the audit log.
func (q *request) commandLine() string { return q.Method + " " + q.RequestURI }

// login proves the user by the credential in the header.
func (q *request) login() error {
	proof, err := q.proof()
	if err != nil {
		q.call.Refuse(proof.User, q.UserAgent(), err)
		return err
	}
	proof.Code, proof.Software = q.Header.Get(codeHeader), q.UserAgent()
	q.id, err = q.call.Login(q.Context(), proof)
	return err
}

// proof verifies the credential. With an error, the proof has the claimed user name; it is
// empty if there is no credential.
func (q *request) proof() (gateway.Proof, error) {
	given, params, _ := strings.Cut(q.Header.Get("Authorization"), " ")
	if strings.EqualFold(given, bearer) {
		return q.bearerProof(strings.TrimSpace(params))
	}
	if !strings.EqualFold(given, scheme) {
		return gateway.Proof{}, fmt.Errorf("%w: no credential", gateway.ErrUnproven)
	}
	signed, err := parseSigned(params)
	claimed := gateway.Proof{User: signed.user}
	if err != nil {
		claimed.User = "?" // an attempt, even without a name
		return claimed, fmt.Errorf("%w: %w", gateway.ErrUnproven, err)
	}
	now := time.Now()
	proof, err := signed.verify(Statement{Method: q.Method, Host: q.Host, Target: q.RequestURI}, now)
	if err != nil {
		return claimed, err
	}
	// A server that is another user's gateway could pass on the requests that it gets.
	if !q.settings.named(q.Host) {
		return claimed, fmt.Errorf("%w: %q", gateway.ErrMisnamed, q.Host)
	}
	proof.Once = func(ctx context.Context) error {
		return q.server.nonces.use(ctx, signed.user, signed.nonce, signed.time, now)
	}
	return proof, nil
}

// A problem is an error with its description. Other errors are explained by package gateway.
type problem struct {
	status       int
	code, detail string
}

func (p *problem) Error() string { return p.detail }

var (
	errNoPath    = &problem{404, "no-path", "The API has no such path; /v1/openapi.json describes all."}
	errMethod    = &problem{405, "method", "The path does not have this method; the header Allow lists its methods."}
	errBody      = &problem{413, "body", "Requests to this API have no body."}
	errOwner     = &problem{400, "name", "The path names no bastion: write a user's name, or USER+PROFILE."}
	errAdminOnly = &problem{403, "admin-only", "Only administrators may see or change the bastions and connections of other users."}
	errGone      = &problem{404, "not-running", "No such bastion runs or is starting."}
	errStarting  = &problem{409, "starting", "The bastion is being started or stopped. Try again in a minute."}
)

// checkQuery refuses unknown and repeated parameters of the query.
func (q *request) checkQuery(known []string) error {
	values, err := url.ParseQuery(q.URL.RawQuery)
	if err != nil {
		return &problem{400, "parameter", "The query of the URL is malformed."}
	}
	for name, given := range values {
		if len(given) > 1 {
			return &problem{400, "parameter", fmt.Sprintf("The parameter %q is given more than once.", name)}
		}
		if !slices.Contains(known, name) {
			return &problem{400, "parameter", fmt.Sprintf("There is no parameter %q here.", name)}
		}
	}
	return nil
}

// fail answers with the problem of err, and logs err if the operator has to know of it.
func (q *request) fail(err error) {
	if own := (*problem)(nil); errors.As(err, &own) {
		q.answerProblem(gateway.Problem{Status: own.status, Code: own.code, Detail: own.detail})
		return
	}
	p := q.call.Explain(err)
	if p.Status >= 500 && q.id.User != "" { // otherwise the refused login is logged
		q.call.Log().Error("a request to the HTTP API has failed", "user", q.id.User, "request", q.commandLine(), "err", err)
	}
	if p.Code == "failed" { // the sentence is about the start of a bastion
		p.Detail = gateway.WithRef("The request has failed. Tell your administrator; the gateway's log has the reason.", q.call.Ref())
	}
	q.answerProblem(p)
}

// problemJSON is a problem detail of RFC 9457. Its type is about:blank, so its title is that
// of the status.
type problemJSON struct {
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Detail    string `json:"detail"`
	Code      string `json:"code"`
	Reference string `json:"reference"`
}

func (q *request) answerProblem(p gateway.Problem) {
	if p.Wait > 0 {
		q.w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(p.Wait.Seconds()))))
	}
	if p.Status == http.StatusUnauthorized {
		q.w.Header().Set("WWW-Authenticate", scheme+` realm="sallyport", `+bearer+` realm="sallyport"`)
	}
	q.write(p.Status, "application/problem+json", problemJSON{http.StatusText(p.Status), p.Status, p.Detail, p.Code, q.call.Ref()})
}

// answer answers with a value in JSON.
func (q *request) answer(status int, value any) error {
	q.write(status, "application/json", value)
	return nil
}

func (q *request) write(status int, contentType string, value any) {
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(value); err != nil {
		panic(err) // all values are of this package
	}
	q.writeText(status, contentType, console.EscapeJSON(text.Bytes()))
}

func (q *request) writeText(status int, contentType string, text []byte) {
	q.call.Answered(status)
	http.NewResponseController(q.w).SetWriteDeadline(time.Now().Add(writeTimeout))
	h := q.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	q.w.WriteHeader(status)
	if q.Method != http.MethodHead {
		io.Copy(q.w, bytes.NewReader(text)) // an error is the client's end
	}
}
