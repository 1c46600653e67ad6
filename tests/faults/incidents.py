"""What has gone wrong elsewhere and in an audit of this server, and where each is held against it.

`INCIDENTS` are 42 incidents of other systems and the audit's findings (D1 to D15). A row of the table names those that
it tries; `TESTS` has the tests of the suite that try the others, or try the same by parts; `GPU` what only a GPU shows.
`tests/test_fault_table.py` holds that each is somewhere and that the tests exist.
"""

from collections.abc import Mapping

INCIDENTS: Mapping[str, str] = {
    "1": "a CUDA error poisons a process that goes on answering",
    "2": "/health is 200 while the worker hangs",
    "3": "a busy worker is taken for dead",
    "4": "two requests share one pipeline's state",
    "5": "memory is kept after a failed request",
    "6": "a number beyond 64 bits ends the server",
    "7": "NaN or Infinity in a body is a 500",
    "8": "lone surrogates and NUL break parsers",
    "9": "bodies without bound fill the memory",
    "10": "huge headers fill the memory",
    "11": "slow clients hold sockets for ever",
    "12": "a host or path passes by the check of keys",
    "13": "a key leaks by the time of its comparison",
    "14": "made-up addresses pass by limits",
    "15": "image_url reaches addresses inside",
    "16": "credentials follow redirects",
    "17": "small files decode to gigabytes",
    "18": "error texts show what is inside",
    "19": "paths lead out of the image store",
    "20": "thousands of ranges take quadratic time",
    "21": "image addresses can be guessed or listed",
    "22": "a pickle among weights runs code",
    "23": "a model folder brings code",
    "24": "a damaged weight file is loaded",
    "25": "checks are gone under python -O",
    "26": "a control port is open",
    "27": "other web pages use a local server",
    "28": "work goes on for clients that have left",
    "29": "a stop ends work in flight",
    "30": "finished work is lost with its connection",
    "31": "a half-alive process passes probes",
    "32": "a full disk or a locked database loses work",
    "33": "a broken picture is reported as a success",
    "34": "one body or prompt holds up the event loop",
    "35": "retries do the work twice",
    "36": "a client's header changes the server's policy",
    "37": "prompts reach the log",
    "38": "line ends and terminal codes reach headers and the log",
    "39": "memory, descriptors or threads grow for days",
    "40": "a device is gone and the server looks ready",
    "41": "request smuggling",
    "42": "a jump of the clock breaks addresses and deadlines",
    "D1": "each new request set the clock of a silent worker back",
    "D2": "a worker that could not be spawned was never tried again",
    "D3": "a worker that hung idle or loading was never noticed",
    "D4": "an outcome that could not be written was stranded",
    "D5": "one slow stranger held up all blocking work",
    "D6": "no deadline for headers, no limit of connections",
    "D7": "no fairness between keys",
    "D8": "an error in a worker's message left a server that looked ready",
    "D9": "the job database held every image twice",
    "D10": "a damaged file ended each start with a traceback",
    "D11": "one database error ended the sweeping for good",
    "D12": "the current folder was on the worker's path",
    "D13": "errors of libraries reached clients",
    "D14": "large JSON was parsed on the event loop, uploads filled /tmp",
    "D15": "kills from outside failed innocent requests",
}

TESTS: Mapping[str, tuple[str, ...]] = {
    "1": (
        "test_step_loop::test_a_lost_device_ends_the_process_whoever_finds_it_out",
        "test_engine::test_out_of_memory_is_the_requests_and_a_cuda_error_is_the_devices",
    ),
    "5": ("test_memory::test_a_request_that_does_not_fit_fails_alone_and_the_worker_goes_on",),
    "6": ("test_fuzz::test_a_native_field_is_accepted_or_named",),
    "7": ("test_fuzz::test_what_is_no_strict_json_is_refused_in_any_field",),
    "9": ("test_bodies::test_stalled_uploads_take_no_more_than_the_budget_and_give_it_back",),
    "13": ("test_key_database::test_a_key_is_shown_once_and_only_its_hash_is_kept",),
    "15": (
        "test_source::test_a_redirect_is_checked_like_the_address_itself",
        "test_source::test_a_name_is_looked_up_once_so_that_it_cannot_change_in_between",
    ),
    "16": ("test_webhooks::test_a_redirect_leads_nowhere",),
    "17": ("test_source::test_decoding_takes_64_mib_beyond_the_picture_and_gives_it_back",),
    "21": ("test_closed::test_image_addresses_can_be_signed_and_expire",),
    "22": (
        "test_weights::test_a_booby_trapped_pickle_beside_good_files_never_runs",
        "test_inspection::test_a_booby_trapped_pickle_is_refused_whatever_its_name",
    ),
    "23": ("test_inspection::test_a_snapshot_with_something_missing_or_with_code_is_refused",),
    "24": (
        "test_pull::test_a_flipped_byte_is_never_put_in_place",
        "test_pull::test_weights_that_are_not_what_was_pulled_are_not_loaded",
    ),
    "25": ("test_fault_table::test_no_check_of_the_server_is_an_assertion",),
    "26": ("test_cluster::test_headers_that_ray_would_obey_do_not_reach_it",),
    "33": (
        "test_engine::test_non_finite_pixels_are_an_error_not_a_picture",
        "test_closed::test_an_image_of_one_colour_is_counted_and_said_or_is_an_error",
    ),
    "36": ("test_cluster::test_headers_that_ray_would_obey_do_not_reach_it",),
    "37": (
        "test_contract::test_no_prompt_and_no_forged_line_in_the_log",
        "test_logs::test_a_message_that_quotes_a_prompt_in_any_form_is_left_out",
    ),
    "39": ("test_idleness::test_cycles_leave_nothing_behind_and_change_no_byte",),
    "40": ("test_heartbeat::test_after_many_deaths_new_work_is_refused_until_a_worker_is_ready",),
    "42": (
        "test_store::test_a_date_that_is_set_anew_expires_nothing_and_keeps_nothing",
        "test_store::test_after_a_start_of_the_machine_its_date_counts_but_never_an_earlier_one",
    ),
    "D3": ("test_heartbeat::test_a_worker_that_stops_while_loading_is_replaced",),
    "D5": (
        "test_strangers::test_a_file_does_not_wait_for_a_prompt_hook",
        "test_strangers::test_the_server_ends_within_its_grace_whatever_a_hook_does",
    ),
    "D7": ("test_fairness::test_one_small_request_passes_sixty_of_another_key",),
    "D8": ("test_heartbeat::test_a_worker_whose_message_cannot_be_handled_is_replaced",),
    "D9": ("test_outcomes::test_a_reply_is_replayed_byte_for_byte_and_its_images_are_in_no_outcome",),
    "D10": (
        "test_start_check::test_a_damaged_file_is_named_in_one_line_or_moved_aside",
        "test_start_check::test_a_database_that_cannot_be_opened_is_a_reason_to_try_later",
    ),
    "D11": ("test_duties::test_a_duty_that_fails_is_logged_and_begun_again",),
    "D12": ("test_closed::test_a_module_in_the_current_folder_is_never_imported",),
    "D13": ("test_closed::test_nothing_of_a_foreign_error_reaches_clients",),
}

GPU: Mapping[str, str] = {
    "a CUDA error in the worker": "1",
    "out of memory on the card, fifty times": "5",
    "a card that falls off the bus": "40",
}
