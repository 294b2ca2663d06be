// Sends a message to a prefloop server and submits a thumb for the answer: go run . "Why is the sky blue?"
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"strings"
	"time"
	"unicode"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	prefloopv1 "example.com/chat/gen/prefloop/v1"
)

func main() {
	log.SetFlags(0)
	host, port := setting("PREFLOOP_HOST", "127.0.0.1"), setting("PREFLOOP_PORT", "50051")
	// Unencrypted only to this machine's loopback; an API key must stay secret.
	transport := credentials.NewTLS(nil)
	if host == "127.0.0.1" || host == "::1" || host == "localhost" {
		transport = insecure.NewCredentials()
	}
	connection, err := grpc.NewClient(net.JoinHostPort(host, port), grpc.WithTransportCredentials(transport))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	caller := metadata.Pairs("x-user-id", setting("PREFLOOP_USER", "ana"))
	if key := setting("PREFLOOP_API_KEY", ""); key != "" {
		caller = metadata.Pairs("authorization", "Bearer "+key)
	}
	ctx := metadata.NewOutgoingContext(context.Background(), caller)

	responseID, err := ask(ctx, prefloopv1.NewChatServiceClient(connection), strings.Join(os.Args[1:], " "))
	if err == nil {
		err = vote(ctx, prefloopv1.NewFeedbackServiceClient(connection), responseID)
	}
	if err != nil {
		log.Fatal(sentence(err))
	}
}

func setting(name, usual string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return usual
}

// Prints the answer as it arrives. Ctrl-C or the deadline ends the call: the server stops sampling and stores the answer so far.
func ask(ctx context.Context, chat prefloopv1.ChatServiceClient, message string) (responseID string, err error) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	stream, err := chat.Chat(ctx, &prefloopv1.ChatRequest{Message: message})
	if err != nil {
		return "", err
	}
	for {
		reply, err := stream.Recv()
		if err == io.EOF {
			return responseID, nil
		} else if err != nil {
			return "", err
		}
		switch event := reply.GetEvent().(type) {
		case *prefloopv1.ChatResponse_Started:
			responseID = event.Started.GetResponseId()
		case *prefloopv1.ChatResponse_Delta:
			fmt.Print(strings.Map(printable, event.Delta.GetText()))
		}
	}
}

func vote(ctx context.Context, feedback prefloopv1.FeedbackServiceClient, responseID string) error {
	var typed string
	fmt.Print("\nGood? y or n: ")
	fmt.Scanln(&typed)
	thumb, ok := map[string]prefloopv1.Thumb{"y": prefloopv1.Thumb_THUMB_UP, "n": prefloopv1.Thumb_THUMB_DOWN}[typed]
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := feedback.SubmitThumb(ctx, &prefloopv1.SubmitThumbRequest{ResponseId: responseID, Thumb: thumb})
	return err
}

// Removes control characters and marks that change the writing direction: model output must not control the terminal.
func printable(r rune) rune {
	if unicode.IsControl(r) && r != '\n' && r != '\t' || unicode.Is(unicode.Bidi_Control, r) {
		return -1
	}
	return r
}

// One sentence for the user, with the server's machine-readable reason if it sent one.
func sentence(err error) string {
	failure := status.Convert(err)
	for _, detail := range failure.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Sprintf("%s (%s)", failure.Message(), info.GetReason())
		}
	}
	return failure.Message()
}
