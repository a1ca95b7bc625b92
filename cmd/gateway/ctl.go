package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/sallyport-ssh/sallyport/internal/api"
	"github.com/sallyport-ssh/sallyport/internal/console"
)

// ctlCmd calls the HTTP API of a gateway, with the user's own key.
type ctlCmd struct {
	Whoami ctlWhoami `cmd:"" help:"Show user, key and roles."`
	Start  ctlStart  `cmd:"" help:"Start a bastion, or find it, and wait until it runs."`
	Stop   ctlStop   `cmd:"" help:"Stop a bastion, and end all connections to it."`
	List   ctlList   `cmd:"" help:"List bastions that run or are starting."`
	Log    ctlLog    `cmd:"" help:"List your last events at the gateway, or follow them."`

	apiClient
}

// Help implements [kong.HelpProvider].
func (ctlCmd) Help() string {
	return "Requests are signed with a key of your ssh-agent, or with the key in a file. docs/api.md describes the API."
}

// An apiClient sends requests to the HTTP API.
type apiClient struct {
	URL      string `required:"" env:"SALLYPORT_URL" placeholder:"URL" help:"The gateway's API, such as https://gateway.example.com:8443."`
	User     string `env:"USER" placeholder:"NAME" help:"Your name at the gateway (default $USER)."`
	Identity string `short:"i" placeholder:"FILE" help:"The key: a private key, or a public key or certificate whose private key is in the agent (default: the first two keys of the agent)."`
	Code     string `placeholder:"DIGITS" help:"A verification code, if you need one. It is valid for one request."`
	CA       string `name:"ca" placeholder:"FILE" help:"Certificates in PEM to trust in place of the system's."`
	JSON     bool   `name:"json" help:"Print the answer in JSON."`
}

// maxAPIAnswer limits an answer, in bytes.
const maxAPIAnswer = 16 << 20

// maxAnswerText limits the text of an answer that is printed, in bytes.
const maxAnswerText = 200

// maxOfferedKeys limits the keys of an agent that are tried: each that is refused adds to the
// penalty of this machine.
const maxOfferedKeys = 2

// An apiAnswer is an answer that is no error.
type apiAnswer struct {
	status int
	body   []byte
}

// decode decodes the answer. It returns false if the user wants it in JSON, which it prints.
func (c *apiClient) decode(a apiAnswer, to any, s streams) (bool, error) {
	if c.JSON {
		_, err := s.out.Write(a.body)
		return false, err
	}
	if err := json.Unmarshal(a.body, to); err != nil {
		return false, fmt.Errorf("the answer of %s: %w", c.URL, err)
	}
	return true, nil
}

// call sends a request, and reads the answer. Wait is for a start; zero means the server's
// default.
func (c *apiClient) call(ctx context.Context, method, target string, wait time.Duration) (apiAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, wait+time.Minute)
	defer cancel()
	header := http.Header{}
	if wait > 0 {
		header.Set("Prefer", fmt.Sprintf("wait=%d", int(wait.Seconds())))
	}
	resp, err := c.open(ctx, method, target, header)
	if err != nil {
		return apiAnswer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAPIAnswer))
	if err != nil {
		return apiAnswer{}, fmt.Errorf("the answer of %s: %w", c.URL, err)
	}
	return apiAnswer{resp.StatusCode, body}, nil
}

// open sends a request, with each key until one is accepted. If the answer is a problem, that
// is the error. The caller closes the body of the response.
func (c *apiClient) open(ctx context.Context, method, target string, header http.Header) (*http.Response, error) {
	signers, close, err := c.signers()
	if err != nil {
		return nil, err
	}
	defer close()
	for i, signer := range signers {
		resp, err := c.openWith(ctx, signer, method, target, header)
		refused := (*apiError)(nil)
		if i+1 < len(signers) && errors.As(err, &refused) && refused.Code == "not-proven" {
			continue
		}
		return resp, err
	}
	return nil, errors.New("the agent has no keys; add one with ssh-add, or name a file with --identity")
}

// An apiError is a problem that the server reports.
type apiError struct {
	status int
	Detail string `json:"detail"`
	Code   string `json:"code"`
}

func (e *apiError) Error() string { return clean(e.Detail) }

func (c *apiClient) openWith(ctx context.Context, signer ssh.Signer, method, target string, header http.Header) (*http.Response, error) {
	base, err := url.Parse(c.URL)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" || strings.Trim(base.Path, "/") != "" {
		return nil, fmt.Errorf("%q is not a URL like https://gateway.example.com:8443", c.URL)
	}
	req, err := http.NewRequestWithContext(ctx, method, base.Scheme+"://"+base.Host+target, nil)
	if err != nil {
		return nil, err
	}
	authorization, err := api.Sign(api.Statement{
		Method: method, Host: req.URL.Host, Target: req.URL.RequestURI(), User: c.User, Time: time.Now(), Nonce: rand.Text(),
	}, signer)
	if err != nil {
		return nil, err
	}
	req.Header = header.Clone()
	req.Header.Set("Authorization", authorization)
	req.Header.Set("User-Agent", "sallyport-ctl")
	if c.Code != "" {
		req.Header.Set("Sallyport-Code", c.Code)
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, TLSHandshakeTimeout: 20 * time.Second}
	if c.CA != "" {
		text, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s: has no certificates", c.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	}
	// A redirect would need another signature.
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		return nil, fmt.Errorf("%w; name its certificate or authority with --ca", err)
	}
	if err != nil || resp.StatusCode < 300 {
		return resp, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAPIAnswer))
	if err != nil {
		return nil, fmt.Errorf("the answer of %s: %w", c.URL, err)
	}
	problem := &apiError{status: resp.StatusCode}
	if json.Unmarshal(body, problem) != nil || problem.Detail == "" {
		// The server of Go answers a request without TLS by a line of text.
		line, _, _ := strings.Cut(string(body[:min(len(body), maxAnswerText)]), "\n")
		return nil, fmt.Errorf("%s answers %s: %s", c.URL, clean(resp.Status), clean(line))
	}
	return nil, problem
}

// signers returns the keys to try. The caller calls close when it has used them.
func (c *apiClient) signers() (signers []ssh.Signer, close func(), err error) {
	var named ssh.PublicKey
	if c.Identity != "" {
		text, err := os.ReadFile(c.Identity)
		if err != nil {
			return nil, nil, err
		}
		if signer, err := ssh.ParsePrivateKey(text); err == nil {
			return []ssh.Signer{signer}, func() {}, nil
		}
		if named, _, _, _, err = ssh.ParseAuthorizedKey(text); err != nil { // a private key with a passphrase
			public, readErr := os.ReadFile(c.Identity + ".pub")
			if readErr != nil {
				return nil, nil, fmt.Errorf("%s: is not a key that can be used without a passphrase; add it to an agent, and name its public key", c.Identity)
			}
			if named, _, _, _, err = ssh.ParseAuthorizedKey(public); err != nil {
				return nil, nil, fmt.Errorf("%s.pub: %w", c.Identity, err)
			}
		}
	}
	socket := os.Getenv("SSH_AUTH_SOCK")
	if socket == "" {
		return nil, nil, errors.New("there is no ssh-agent (SSH_AUTH_SOCK is not set); start one, or name a private key with --identity")
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, nil, fmt.Errorf("connecting to the ssh-agent: %w", err)
	}
	close = func() { conn.Close() }
	all, err := agent.NewClient(conn).Signers()
	if err != nil {
		close()
		return nil, nil, fmt.Errorf("asking the ssh-agent for its keys: %w", err)
	}
	if named != nil {
		all = slices.DeleteFunc(all, func(s ssh.Signer) bool { return string(s.PublicKey().Marshal()) != string(named.Marshal()) })
		if len(all) == 0 {
			close()
			return nil, nil, fmt.Errorf("the ssh-agent does not have the key %s; add it with ssh-add", c.Identity)
		}
	}
	return all[:min(len(all), maxOfferedKeys)], close, nil
}

// clean replaces characters that could control a terminal.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// bastion returns the path of a bastion, by default the user's.
func (c *apiClient) bastion(name string) string {
	return "/v1/bastions/" + strings.ReplaceAll(url.PathEscape(cmp.Or(name, c.User)), "%2B", "+")
}

type ctlWhoami struct{}

// Run prints the user.
func (ctlWhoami) Run(ctx context.Context, c *ctlCmd, s streams) error {
	answer, err := c.call(ctx, "GET", "/v1/whoami", 0)
	if err != nil {
		return err
	}
	var me console.Login
	if text, err := c.decode(answer, &me, s); !text {
		return err
	}
	roles := cmp.Or(strings.Join(me.Roles, " "), "none")
	if me.Admin {
		roles += " (administrator)"
	}
	_, err = fmt.Fprintf(s.out, "user   %s\nkey    %s\nroles  %s\n", clean(me.User), clean(me.Key), clean(roles))
	return err
}

type ctlStart struct {
	Bastion string `arg:"" optional:"" help:"As before the @ of ssh, such as alice+big (default: your name)."`
}

// startPoll is how long one request waits for a bastion, and the interval of the dots.
const startPoll = 4 * time.Second

// Run starts the bastion, and prints the command to connect.
func (cmd *ctlStart) Run(ctx context.Context, c *ctlCmd, s streams) error {
	wait := startPoll
	if c.Code != "" { // it is good for one request
		wait = 10 * time.Minute
	}
	for waited := false; ; waited = true {
		answer, err := c.call(ctx, "POST", c.bastion(cmd.Bastion), wait)
		if waited && (err != nil || answer.status == http.StatusOK) {
			fmt.Fprintln(s.err)
		}
		if err != nil {
			return err
		}
		if answer.status == http.StatusOK {
			var b api.Bastion
			if text, err := c.decode(answer, &b, s); !text || b.SSH == nil {
				return err
			}
			_, err := fmt.Fprintln(s.out, clean(b.SSH.Command))
			return err
		}
		if !waited {
			fmt.Fprint(s.err, "Starting the bastion ")
		}
		fmt.Fprint(s.err, ".")
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

type ctlStop struct {
	Bastion string `arg:"" optional:"" help:"As before the @ of ssh, such as alice+big (default: your name)."`
}

// Run stops the bastion.
func (cmd *ctlStop) Run(ctx context.Context, c *ctlCmd, s streams) error {
	answer, err := c.call(ctx, "DELETE", c.bastion(cmd.Bastion), 0)
	if err != nil {
		return err
	}
	var stopped console.Stopped
	if text, err := c.decode(answer, &stopped, s); !text {
		return err
	}
	_, err = fmt.Fprintf(s.out, "%s+%s is stopped; %d connections have ended.\n", clean(stopped.User), clean(stopped.Profile), stopped.Connections)
	return err
}

type ctlList struct{}

// Run lists bastions.
func (ctlList) Run(ctx context.Context, c *ctlCmd, s streams) error {
	answer, err := c.call(ctx, "GET", "/v1/bastions", 0)
	if err != nil {
		return err
	}
	var all struct{ Bastions []api.Bastion }
	if text, err := c.decode(answer, &all, s); !text {
		return err
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "USER\tPROFILE\tSTATE\tSINCE (UTC)\tGEN\tTASK")
	for _, b := range all.Bastions {
		since := "-"
		if b.Since != nil {
			since = b.Since.UTC().Format(time.DateTime)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", clean(b.User), clean(b.Profile), clean(b.State), since, b.Generation, clean(cmp.Or(b.Task, "-")))
	}
	return w.Flush()
}
