//! A client whose requests about pods' objects take turns: many pods at once do not each open a connection, whose buffers and
//! handshakes cost more than the wait. Watches, which last, and what keeps the node alive do not wait.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Uri};
use kube::client::Body;
use tokio::sync::Semaphore;

/// Requests under way at once.
const AT_ONCE: usize = 8;
/// How long one that gets no answer counts among them.
const LONGEST_TURN: Duration = Duration::from_secs(10);

/// The client with its requests taking turns.
pub(crate) fn taking_turns(client: kube::Client) -> kube::Client {
    let (turns, namespace) = (Arc::new(Semaphore::new(AT_ONCE)), client.default_namespace().to_owned());
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, turns) = (client.clone(), turns.clone());
        async move {
            // The semaphore is never closed.
            let turn = if waits(request.uri()) { turns.acquire_owned().await.ok() } else { None };
            let mut answer = Box::pin(client.send(request));
            match tokio::time::timeout(LONGEST_TURN, &mut answer).await {
                Ok(answer) => answer,
                // A connection that hangs is not to hold up the others.
                Err(_elapsed) => {
                    drop(turn);
                    answer.await
                }
            }
        }
    });
    kube::Client::new(service, namespace)
}

/// Whether a request may have to wait.
fn waits(uri: &Uri) -> bool {
    let watches = uri.query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
    uri.path().contains("/namespaces/") && !uri.path().contains("/leases") && !watches
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use k8s_openapi::api::core::v1::{ConfigMap, Node};
    use kube::Api;

    use super::*;

    #[test]
    fn watches_leases_and_the_node_do_not_wait() {
        let wait = |uri: &str| waits(&uri.parse().unwrap());
        assert!(wait("/api/v1/namespaces/n/pods/p/status?fieldManager=x"));
        assert!(!wait("/api/v1/namespaces/n/configmaps?&watch=true&timeoutSeconds=290"));
        assert!(!wait("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n"));
        assert!(!wait("/api/v1/nodes/n/status"));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_so_many_are_under_way_at_once() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, highest) = (now.clone(), most.clone());
        let service = tower::service_fn(move |request: Request<Body>| {
            let (now, most) = (counted.clone(), highest.clone());
            async move {
                let counts = request.uri().path().contains("/namespaces/");
                if counts {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
                if counts {
                    now.fetch_sub(1, Ordering::SeqCst);
                }
                let body = br#"{"metadata": {"name": "x"}}"#.to_vec();
                Ok::<_, std::convert::Infallible>(http::Response::new(Body::from(body)))
            }
        });
        let client = taking_turns(kube::Client::new(service, "default"));
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "n");
        let nodes: Api<Node> = Api::all(client);
        let began = tokio::time::Instant::now();
        let many = futures::future::join_all((0..AT_ONCE * 2).map(|_| maps.get("m")));
        let node = async {
            nodes.get("n").await.unwrap();
            began.elapsed()
        };
        let (answers, node_took) = tokio::join!(many, node);
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(most.load(Ordering::SeqCst), AT_ONCE);
        assert_eq!((began.elapsed().as_secs(), node_took.as_secs()), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_hangs_lets_the_others_go_on() {
        let service = tower::service_fn(|request: Request<Body>| async move {
            if request.uri().path().ends_with("/hangs") {
                std::future::pending::<()>().await;
            }
            let body = br#"{"metadata": {"name": "x"}}"#.to_vec();
            Ok::<_, std::convert::Infallible>(http::Response::new(Body::from(body)))
        });
        let maps: Api<ConfigMap> = Api::namespaced(taking_turns(kube::Client::new(service, "default")), "n");
        let hanging: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let maps = maps.clone();
                tokio::spawn(async move { maps.get("hangs").await.map(drop) })
            })
            .collect();
        tokio::task::yield_now().await;
        let began = tokio::time::Instant::now();
        maps.get("m").await.unwrap();
        assert_eq!(began.elapsed(), LONGEST_TURN);
        assert!(hanging.iter().all(|one| !one.is_finished()), "they have an answer coming still");
        hanging.iter().for_each(|one| one.abort());
    }
}
