// Package secrets reads secrets, and other texts, from AWS by reference:
//
//	ssm:NAME              a parameter of AWS Systems Manager, decrypted
//	ssm:/PATH             all parameters directly below a path, for [Reader.Folder]
//	secretsmanager:NAME   the string of a secret of AWS Secrets Manager
//
// NAME may be an ARN. The name of a parameter may end in ":" and a version or label.
//
// No error contains the text of a secret.
//
// # Permissions
//
// A gateway needs ssm:GetParameter, ssm:GetParametersByPath or
// secretsmanager:GetSecretValue, and kms:Decrypt if a customer managed key encrypts
// the secret.
package secrets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
	"github.com/aws/smithy-go"
)

const (
	// readTimeout bounds Read, with the retries of the SDK.
	readTimeout = 10 * time.Second
	// attemptTimeout bounds one attempt of a call.
	attemptTimeout = 3 * time.Second
	// maxName is the longest name or ARN, in bytes.
	maxName = 2048
	// maxSecret is the largest secret of Secrets Manager, in bytes. Parameters
	// have at most 8 KiB.
	maxSecret = 64 << 10
	// maxResponse bounds a response, in bytes. JSON may escape each byte of a
	// secret in six. A page of Folder has at most 80 KiB of values.
	maxResponse = 6*max(maxSecret, pageSize*8<<10) + 16<<10

	// pageSize is the most parameters that GetParametersByPath returns at once.
	pageSize = 10
	// maxFolder is the most parameters of a Folder. It bounds the calls, which an
	// account may make 40 times a second by default, and the memory, to 8 MiB.
	maxFolder = 1000
)

// A Reader reads secrets. [New] makes it. It is safe for concurrent use.
type Reader struct {
	ssm     *ssm.Client
	secrets *secretsmanager.Client
	region  string
}

// New returns a Reader for the Region and the credentials of cfg. It makes no call.
func New(cfg aws.Config) *Reader {
	cfg = cfg.Copy()
	var client aws.HTTPClient = awshttp.NewBuildableClient()
	if cfg.HTTPClient != nil {
		client = cfg.HTTPClient
	}
	cfg.HTTPClient = bounded{client}
	return &Reader{ssm: ssm.NewFromConfig(cfg), secrets: secretsmanager.NewFromConfig(cfg), region: cfg.Region}
}

// A Secret is the text of a secret.
type Secret struct {
	Text []byte
	// Encrypted reports whether AWS stores it encrypted: every secret of Secrets
	// Manager, and parameters of type SecureString.
	Encrypted bool
}

var (
	parameterPattern = regexp.MustCompile(`^[A-Za-z0-9_./:-]+$`)
	secretPattern    = regexp.MustCompile(`^[A-Za-z0-9/_+=.@:!-]+$`)
)

// Read returns the secret of a reference. It blocks until AWS answers, for some
// seconds at most. Errors do not repeat the reference, and name a remedy.
func (r *Reader) Read(ctx context.Context, reference string) (Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	service, name, _ := strings.Cut(reference, ":")
	var secret Secret
	var err error
	switch {
	case len(name) > maxName:
		return Secret{}, fmt.Errorf("is longer than %d bytes; correct the name", maxName)
	case service == "ssm" && parameterPattern.MatchString(name):
		secret, err = r.parameter(ctx, name)
	case service == "secretsmanager" && secretPattern.MatchString(name):
		secret, err = r.secret(ctx, name)
	default:
		return Secret{}, errors.New("is not a reference to a secret; write ssm:NAME or secretsmanager:NAME, with the name or the ARN")
	}
	switch {
	case err != nil:
		return Secret{}, err
	case len(secret.Text) == 0:
		return Secret{}, errors.New("is empty; store a text in it")
	case len(secret.Text) > maxSecret:
		return Secret{}, fmt.Errorf("is longer than %d bytes; store less in it", maxSecret)
	}
	return secret, nil
}

var folderPattern = regexp.MustCompile(`^(?:/[A-Za-z0-9_.-]+)+$`)

// Folder returns the parameters of Systems Manager directly below the path of a
// reference, by the last part of their names: at most 1,000, or it is an error. It
// calls AWS once for ten of them, and blocks until all have been read or ctx ends.
// Errors do not repeat the reference, and name a remedy.
func (r *Reader) Folder(ctx context.Context, reference string) (map[string]Secret, error) {
	service, path, _ := strings.Cut(reference, ":")
	if service != "ssm" || !folderPattern.MatchString(path) || len(path) > maxName {
		return nil, errors.New("is not the path of parameters; write ssm:/NAME, as in ssm:/sallyport/users")
	}
	folder := map[string]Secret{}
	in := &ssm.GetParametersByPathInput{Path: &path, WithDecryption: aws.Bool(true), MaxResults: aws.Int32(pageSize)}
	for {
		page, err := r.page(ctx, in)
		if err != nil {
			return nil, err
		}
		for _, p := range page.Parameters {
			name, ok := strings.CutPrefix(aws.ToString(p.Name), path+"/")
			if !ok || name == "" || strings.Contains(name, "/") || p.Value == nil {
				return nil, errors.New("AWS answered with parameters of another path; try again")
			}
			folder[name] = Secret{[]byte(*p.Value), p.Type == types.ParameterTypeSecureString}
		}
		if len(folder) > maxFolder {
			return nil, fmt.Errorf("has more than %d parameters; use a folder of files, or authorized_keys_command", maxFolder)
		}
		if page.NextToken == nil {
			return folder, nil
		}
		in.NextToken = page.NextToken // also after an empty page
	}
}

func (r *Reader) page(ctx context.Context, in *ssm.GetParametersByPathInput) (*ssm.GetParametersByPathOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	page, err := r.ssm.GetParametersByPath(ctx, in)
	if err != nil {
		return nil, r.explain(err, "ssm:GetParametersByPath")
	}
	return page, nil
}

func (r *Reader) parameter(ctx context.Context, name string) (Secret, error) {
	out, err := r.ssm.GetParameter(ctx, &ssm.GetParameterInput{Name: &name, WithDecryption: aws.Bool(true)})
	if err != nil {
		return Secret{}, r.explain(err, "ssm:GetParameter")
	}
	if out.Parameter == nil || out.Parameter.Value == nil {
		return Secret{}, errors.New("AWS answered without a value; try again")
	}
	return Secret{[]byte(*out.Parameter.Value), out.Parameter.Type == types.ParameterTypeSecureString}, nil
}

func (r *Reader) secret(ctx context.Context, name string) (Secret, error) {
	out, err := r.secrets.GetSecretValue(ctx, &secretsmanager.GetSecretValueInput{SecretId: &name})
	if err != nil {
		return Secret{}, r.explain(err, "secretsmanager:GetSecretValue")
	}
	if out.SecretString == nil {
		return Secret{}, errors.New("is binary; store the text, with --secret-string file://FILE")
	}
	return Secret{[]byte(*out.SecretString), true}, nil
}

// errTooLong is returned by bounded.
var errTooLong = fmt.Errorf("the response is longer than %d bytes", maxResponse)

// explain returns an error for the operator. action is the permission that the call
// needs.
func (r *Reader) explain(err error, action string) error {
	var api smithy.APIError
	var unreadable *smithy.DeserializationError
	switch {
	case errors.As(err, &unreadable):
		// Its text may quote the response.
		return errors.New("the response of AWS cannot be read; is AWS_ENDPOINT_URL right?")
	case errors.As(err, &api):
		return r.explainCode(api, action)
	case errors.Is(err, errTooLong):
		return errTooLong
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("AWS does not answer %s; check the network of the gateway, which needs a route or a VPC endpoint to the service", action)
	}
	return fmt.Errorf("%s: %w", action, err)
}

func (r *Reader) explainCode(api smithy.APIError, action string) error {
	said := api.ErrorMessage()
	said = fmt.Sprintf("%s: %q", api.ErrorCode(), said[:min(len(said), 500)])
	switch api.ErrorCode() {
	case "ParameterNotFound", "ParameterVersionNotFound", "ResourceNotFoundException":
		return fmt.Errorf("does not exist in the Region %s; create it there, or correct the name or AWS_REGION (%s)", r.region, said)
	case "AccessDeniedException", "AccessDenied":
		return fmt.Errorf("access is denied; grant the gateway %s, and kms:Decrypt if you encrypt with a key of your own, see docs/iam.md (%s)", action, said)
	case "InvalidKeyId", "DecryptionFailure", "KMSInvalidStateException":
		return fmt.Errorf("cannot be decrypted; check that its KMS key exists, is enabled, and permits the gateway kms:Decrypt (%s)", said)
	case "InvalidRequestException":
		return fmt.Errorf("cannot be read; is it marked for deletion? Then restore it (%s)", said)
	case "ThrottlingException", "Throttling", "TooManyRequestsException":
		return fmt.Errorf("AWS throttles %s; try again (%s)", action, said)
	}
	return fmt.Errorf("%s failed (%s)", action, said)
}

// bounded is an HTTP client whose attempts have a timeout, and whose responses a
// limited size. It reads a response before it returns it.
type bounded struct{ client aws.HTTPClient }

func (b bounded) Do(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(req.Context(), attemptTimeout)
	defer cancel()
	resp, err := b.client.Do(req.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxResponse {
		return nil, errTooLong
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}
