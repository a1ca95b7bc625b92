package awsfake

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// A protocol is the wire protocol of a service.
type protocol int

const (
	awsJSON  protocol = iota // AWS JSON 1.1: ECS
	ec2Query                 // EC2
	awsQuery                 // STS
)

const ecsTarget = "AmazonEC2ContainerServiceV20141113."

// route returns the service and the action of a request. The form is that of a query.
func route(r *http.Request, body []byte) (protocol, string, url.Values, error) {
	if target, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), ecsTarget); ok {
		return awsJSON, "ecs:" + target, nil, nil
	}
	if r.Header.Get("X-Amz-Target") != "" {
		return 0, "", nil, fmt.Errorf("no service for target %q", r.Header.Get("X-Amz-Target"))
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return 0, "", nil, fmt.Errorf("the body is no form: %w", err)
	}
	switch form.Get("Version") {
	case "2016-11-15":
		return ec2Query, "ec2:" + form.Get("Action"), form, nil
	case "2011-06-15":
		return awsQuery, "sts:" + form.Get("Action"), form, nil
	}
	return 0, "", nil, errors.New("neither a target nor a version of a service that is here")
}

func (p protocol) answer(w http.ResponseWriter, out []byte, failed *apiError) {
	h := w.Header()
	h.Set("X-Amzn-Requestid", "00000000-0000-0000-0000-000000000000")
	if p == awsJSON {
		h.Set("Content-Type", "application/x-amz-json-1.1")
	} else {
		h.Set("Content-Type", "text/xml;charset=UTF-8")
	}
	if failed == nil {
		w.Write(out)
		return
	}
	w.WriteHeader(failed.status)
	switch p {
	case awsJSON:
		answer := map[string]any{"__type": failed.code, "message": failed.message}
		if failed.ids != nil {
			answer["resourceIds"] = failed.ids
		}
		json.NewEncoder(w).Encode(answer)
	case ec2Query:
		var b bytes.Buffer
		fmt.Fprint(&b, `<?xml version="1.0" encoding="UTF-8"?>`+"\n<Response><Errors><Error><Code>", failed.code, "</Code><Message>")
		xml.EscapeText(&b, []byte(failed.message))
		fmt.Fprint(&b, "</Message></Error></Errors><RequestID>0</RequestID></Response>")
		w.Write(b.Bytes())
	case awsQuery:
		var b bytes.Buffer
		fmt.Fprint(&b, "<ErrorResponse><Error><Type>Sender</Type><Code>", failed.code, "</Code><Message>")
		xml.EscapeText(&b, []byte(failed.message))
		fmt.Fprint(&b, "</Message></Error><RequestId>0</RequestId></ErrorResponse>")
		w.Write(b.Bytes())
	}
}

// maxSkew is the permitted difference of clocks (Troubleshooting Signature Version 4,
// IAM User Guide).
const maxSkew = 5 * time.Minute

// authenticate verifies the signature (Signature Version 4), by making it again.
func (c *Cloud) authenticate(r *http.Request, body []byte, service string) *apiError {
	bad := func(code, message string) *apiError { return &apiError{403, code, message, nil} }
	unknown, mismatch, expired := "UnrecognizedClientException", "InvalidSignatureException", "InvalidSignatureException"
	switch service {
	case "ec2":
		unknown, mismatch, expired = "AuthFailure", "AuthFailure", "AuthFailure"
	case "sts":
		unknown, mismatch, expired = "InvalidClientTokenId", "SignatureDoesNotMatch", "SignatureDoesNotMatch"
	}
	parts := map[string]string{}
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	for part := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		parts[name] = value
	}
	credential := strings.Split(parts["Credential"], "/")
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if !ok || len(credential) != 5 || err != nil {
		return bad("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	if credential[0] != AccessKey {
		return bad(unknown, "The security token included in the request is invalid.")
	}
	if credential[3] != service || credential[2] != Region || credential[4] != "aws4_request" || credential[1] != at.Format("20060102") {
		return bad(mismatch, "Credential should be scoped to a valid region and service.")
	}
	signed := strings.Split(parts["SignedHeaders"], ";")
	for _, must := range []string{"host", "x-amz-date"} {
		if !slices.Contains(signed, must) {
			return bad(mismatch, "'"+must+"' must be a signed header")
		}
	}
	again, err := http.NewRequest(r.Method, r.URL.String(), io.NopCloser(bytes.NewReader(body)))
	if err != nil {
		return bad(mismatch, err.Error())
	}
	again.Host = r.Host
	if again.Host == "" {
		again.Host = r.URL.Host
	}
	for _, name := range signed {
		switch name {
		case "host":
		case "content-length":
			again.ContentLength = int64(len(body))
		default:
			again.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	}
	hash := sha256.Sum256(body)
	key := aws.Credentials{AccessKeyID: AccessKey, SecretAccessKey: SecretKey}
	if err := v4.NewSigner().SignHTTP(context.Background(), key, again, hex.EncodeToString(hash[:]), service, Region, at); err != nil {
		return bad(mismatch, err.Error())
	}
	_, want, _ := strings.Cut(again.Header.Get("Authorization"), "Signature=")
	if want != parts["Signature"] {
		return bad(mismatch, "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	now := c.now()
	if at.Before(now.Add(-maxSkew)) {
		return bad(expired, fmt.Sprintf("Signature expired: %s is now earlier than %s (%s - 5 min.)",
			at.Format("20060102T150405Z"), now.Add(-maxSkew).UTC().Format("20060102T150405Z"), now.UTC().Format("20060102T150405Z")))
	}
	if at.After(now.Add(maxSkew)) {
		return bad(expired, fmt.Sprintf("Signature not yet current: %s is still later than %s (%s + 5 min.)",
			at.Format("20060102T150405Z"), now.Add(maxSkew).UTC().Format("20060102T150405Z"), now.UTC().Format("20060102T150405Z")))
	}
	return nil
}
