package auth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// A fetcher fetches users' keys from a web server.
type fetcher struct {
	template string
	client   *http.Client
}

func newFetcher(template string) *fetcher {
	return &fetcher{
		template: template,
		client: &http.Client{
			Transport: &http.Transport{
				Proxy:                  http.ProxyFromEnvironment,
				ForceAttemptHTTP2:      true,
				MaxIdleConns:           maxInFlight,
				IdleConnTimeout:        time.Minute,
				MaxResponseHeaderBytes: 64 << 10,
			},
			CheckRedirect: checkRedirect,
		},
	}
}

// checkRedirect follows at most three redirects. They may lead to another host only
// by https.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > 3 {
		return errors.New("redirected more than three times")
	}
	if err := checkURL(req.URL); err != nil {
		return fmt.Errorf("redirected: %w", err)
	}
	if req.URL.Scheme != "https" && req.URL.Host != via[0].URL.Host {
		return errors.New("redirected to another host without https")
	}
	return nil
}

// checkURL refuses URLs that keys must not be fetched from. No error repeats the URL,
// because it may contain a token.
func checkURL(u *url.URL) error {
	switch {
	case u.Host == "":
		return errors.New("the URL has no host")
	case u.User != nil:
		return errors.New("the URL has a password")
	case u.Scheme == "https", u.Scheme == "http" && isLoopback(u.Hostname()):
		return nil
	}
	return errors.New("the URL does not begin with https://")
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// expandURL replaces %u by the user's name.
func expandURL(template, user string) (*url.URL, error) {
	scheme, rest, _ := strings.Cut(template, "://")
	host, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		host, path = rest[:i], rest[i:]
	}
	if strings.Contains(path, "#") {
		return nil, errors.New("the URL has a fragment, which is not sent to the server")
	}
	if strings.Contains(scheme+host, "%") || !strings.Contains(path, "%u") {
		return nil, errors.New("%u, which stands for the user's name, must be in the path or the query of the URL, and in no other part")
	}
	path, query, hasQuery := strings.Cut(path, "?")
	s := scheme + "://" + host + strings.ReplaceAll(path, "%u", url.PathEscape(user))
	if hasQuery {
		s += "?" + strings.ReplaceAll(query, "%u", url.QueryEscape(user))
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	if err := checkURL(u); err != nil {
		return nil, err
	}
	return u, nil
}

// keysOnly refuses the options that a web server must not set. It is trusted for the
// user's keys and for restrictions of them, but not for certificate authorities or
// for the environment of her sessions.
func keysOnly(o options) error {
	switch {
	case o.authority:
		return errors.New(`option "cert-authority": not accepted from a web server; the line is refused`)
	case o.permissions.Environment != nil:
		return errors.New(`option "environment": not accepted from a web server; the line is refused`)
	}
	return nil
}

// fetch is lookup.fetch for URL. A user whom the server does not find has no keys.
func (f *fetcher) fetch(ctx context.Context, user string, _ ssh.PublicKey, last answer) (answer, error) {
	u, err := expandURL(f.template, user)
	if err != nil {
		return answer{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return answer{}, errors.New("not a URL")
	}
	req.Header.Set("User-Agent", "sallyport")
	req.Header.Set("Accept", "text/plain, */*;q=0.1")
	if last.file != nil && last.etag != "" {
		req.Header.Set("If-None-Match", last.etag)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		if urlErr := (*url.Error)(nil); errors.As(err, &urlErr) {
			err = urlErr.Err // without the URL
		}
		return answer{}, fmt.Errorf("asking %s: %w", u.Host, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotModified:
		if last.file == nil {
			return answer{}, fmt.Errorf("asking %s: answers 304 Not Modified to an unconditional request", u.Host)
		}
		return last, nil
	case http.StatusNotFound, http.StatusGone:
		return answer{file: &keyFile{}}, nil
	default:
		return answer{}, fmt.Errorf("asking %s: %s", u.Host, resp.Status)
	}
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
		return answer{}, fmt.Errorf("the answer of %s is a web page", u.Host) // most likely a login form
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return answer{}, fmt.Errorf("reading the answer of %s: %w", u.Host, err)
	case len(data) > maxAnswer:
		return answer{}, fmt.Errorf("the answer of %s is longer than %d bytes", u.Host, maxAnswer)
	}
	got := newAnswer(user, data, keysOnly)
	if etag := resp.Header.Get("ETag"); len(etag) <= 1024 {
		got.etag = etag
	}
	return got, nil
}
