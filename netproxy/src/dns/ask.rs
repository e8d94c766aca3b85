//! One question to one resolver: UDP, again when nothing comes, and TCP when the answer does not fit.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, Query};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep_until, timeout};

use super::upstream::UpstreamError;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// When a question is sent again: a datagram that got lost costs no more than that.
const RESEND_AFTER: [Duration; 2] = [Duration::from_millis(400), Duration::from_millis(1200)];
const UDP_PAYLOAD_BYTES: u16 = 1232;

/// Asks one server, by TCP when the answer does not fit into a datagram.
pub async fn ask(server: SocketAddr, query: &Query, dnssec: bool) -> Result<Message, UpstreamError> {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD_BYTES).set_dnssec_ok(dnssec);
    question.set_edns(edns);
    let bytes = question.to_vec().map_err(UpstreamError::Encode)?;
    let failed = |source| UpstreamError::Server { server, source };
    let expired = |_| failed(io::ErrorKind::TimedOut.into());
    let answer = timeout(ATTEMPT_TIMEOUT, by_udp(server, &question, &bytes)).await.map_err(expired)?.map_err(failed)?;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    timeout(ATTEMPT_TIMEOUT, by_tcp(server, &question, &bytes)).await.map_err(expired)?.map_err(failed)
}

/// Whether a message answers the question that was asked: anybody can send to an open port.
fn matches(question: &Message, answer: &Message) -> bool {
    let same = |a: &Query, b: &Query| a.name() == b.name() && a.query_type() == b.query_type();
    answer.metadata.id == question.metadata.id
        && answer.queries.len() == question.queries.len()
        && answer.queries.iter().zip(&question.queries).all(|(a, b)| same(a, b))
}

async fn by_udp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    // A fresh port for each question is half of what makes a forged answer improbable.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let begin = Instant::now();
    let mut resends = RESEND_AFTER.into_iter();
    let mut buffer = vec![0; 4096];
    socket.send(bytes).await?;
    let mut resend = resends.next();
    loop {
        let length = tokio::select! {
            received = socket.recv(&mut buffer) => received?,
            () = sleep_until(begin + resend.unwrap_or_default()), if resend.is_some() => {
                socket.send(bytes).await?;
                resend = resends.next();
                continue;
            }
        };
        if let Ok(answer) = Message::from_vec(&buffer[..length])
            && matches(question, &answer)
        {
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    let answer = Message::from_vec(&buffer).map_err(io::Error::other)?;
    if matches(question, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}
