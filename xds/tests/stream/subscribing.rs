//! What is asked for: names, wildcards, again, no longer, and what nobody serves.

use super::conversation::{delta, envoy_delta, envoy_whole, whole};

#[test]
fn unknown_names_are_told_in_delta_and_kept_waiting_in_state_of_the_world() {
    delta(
        "view 1 eds a=1
         -> eds +a +x
         <- eds 1-1 a=1 -x
         -> eds ack
         view 2 eds a=1 x=1
         <- eds 2-2 x=1
         -> eds ack
         view 3 eds a=1
         <- eds 3-3 -x",
    );
    whole(
        "view 1 eds a=1
         -> eds x
         <- nothing
         view 2 eds a=1 x=1
         <- eds 2-1 x=1
         -> eds x ack",
    );
}

#[test]
fn what_is_asked_for_again_is_sent_again() {
    delta(
        "view 1 eds a=1 b=1
         -> eds +a +b
         <- eds 1-1 a=1 b=1
         -> eds ack
         -> eds +a
         <- eds 1-2 a=1
         # asked for while it is on its way: it may have been forgotten since
         -> eds -a +a
         -> eds ack
         <- eds 1-3 a=1",
    );
}

#[test]
fn what_is_no_longer_asked_for_is_no_longer_sent() {
    delta(
        "view 1 eds a=1 b=1
         -> eds +a +b
         <- eds 1-1 a=1 b=1
         -> eds ack -a
         view 2 eds a=2 b=2
         <- eds 2-2 b=2",
    );
    whole(
        "view 1 eds a=1 b=1
         -> eds a b
         <- eds 1-1 a=1 b=1
         -> eds b ack
         view 2 eds a=2 b=2
         <- eds 2-2 b=2
         -> eds a b ack
         <- eds 2-3 a=2 b=2",
    );
}

#[test]
fn a_wildcard_can_be_named_and_taken_back() {
    delta(
        "view 1 cds a=1 b=1
         -> cds +*
         <- cds 1-1 a=1 b=1
         -> cds ack +a -*
         <- cds 1-2 a=1
         -> cds ack
         view 2 cds a=1 b=2
         <- nothing
         view 3 cds a=2 b=2
         <- cds 3-3 a=2",
    );
    // Asking for a name beside the wildcard, and no longer: the client is told what holds.
    delta(
        "view 1 cds a=1
         -> cds
         <- cds 1-1 a=1
         -> cds ack +a
         <- cds 1-2 a=1
         -> cds ack -a
         <- cds 1-3 a=1",
    );
    whole("view 1 eds a=1 b=1\n-> eds *\n<- eds 1-1 a=1 b=1");
    whole("view 1 cds a=1 b=1\n-> cds a\n<- cds 1-1 a=1\n-> cds ack\n<- nothing");
}

#[test]
fn a_named_cluster_that_goes_leaves_an_empty_state_of_the_world() {
    whole(
        "view 1 cds a=1
         -> cds a
         <- cds 1-1 a=1
         -> cds ack
         -> lds x ack
         wait 500
         view 2
         <- cds 2-2
         -> cds a ack
         <- nothing
         cds synced",
    );
}

#[test]
fn clusters_are_not_removed_before_a_client_that_reconnects_could_ask_for_listeners() {
    delta(
        "view 9 cds a=1
         -> cds has a=1 gone=1
         <- nothing
         wait 500
         <- cds 9-1 -gone",
    );
}

#[test]
fn stale_nonces_are_ignored() {
    whole(
        "view 1 cds a=1
         -> cds
         <- cds 1-1 a=1
         -> cds ack
         view 2 cds a=2
         <- cds 2-2 a=2
         -> cds ack 1-1
         <- nothing
         -> cds nack 1-1 late
         <- nothing
         -> cds ack
         cds synced",
    );
    // In delta the answer is void, but what the client subscribes to is not.
    delta(
        "view 1 eds a=1 b=1
         -> eds +a
         <- eds 1-1 a=1
         -> eds ack 0-9 +b
         <- nothing
         -> eds ack
         <- eds 1-2 b=1",
    );
}

#[test]
fn duplicates_change_nothing() {
    whole("view 1 eds a=1\n-> eds a a\n<- eds 1-1 a=1\n-> eds a a ack\n<- nothing\n-> eds a ack\n<- nothing");
    delta("view 1 eds a=1\n-> eds +a +a\n<- eds 1-1 a=1\n-> eds ack\n<- nothing\n-> eds ack\n<- nothing");
}

#[test]
fn stock_envoy_gets_endpoints_again_when_their_cluster_is_updated() {
    for envoy in [envoy_delta, envoy_whole] {
        envoy(
            "view 1 cds a=1 b=1 eds a=1 b=1
             -> cds
             <- cds 1-1 a=1 b=1
             -> eds a b
             <- eds 1-2 a=1 b=1
             -> cds ack
             -> eds ack
             view 2 cds a=2 b=1 eds a=1 b=1
             <- cds 2-3 a=2
             <- eds 2-4 a=1",
        );
    }
}

#[test]
fn types_that_we_do_not_serve_get_an_empty_answer_once() {
    delta(
        "view 4 cds a=1
         -> type.googleapis.com/x.Y +secret
         <- type.googleapis.com/x.Y 4-1 -secret
         -> type.googleapis.com/x.Y ack
         <- nothing",
    );
    whole(
        "view 4 cds a=1
         -> type.googleapis.com/x.Y secret
         <- type.googleapis.com/x.Y 4-1
         -> type.googleapis.com/x.Y secret ack
         <- nothing",
    );
}
