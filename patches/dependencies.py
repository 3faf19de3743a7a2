# SPDX-License-Identifier: Apache-2.0
"""vLLM methods that tokenpool overrides or calls although they are private: nothing is replaced, only watched."""

from __future__ import annotations

from tokenpool.patches.base import Patch, known

_CORE = "vllm.v1.engine.core:EngineCoreProc"
_REMOVAL = "vLLM offers the same as public API"

PATCHES = (
    Patch(
        name="handshake",
        target=f"{_CORE}._perform_handshakes",
        hashes=known(
            v0_32_0="652e864831c8444ff69bd5e68ee7bde8c37c94bb44dfec05d69eecef7e009132",
            v0_29_0="10d5feebd78a9a05e45ef1a1161877dee87d811611180af91d122dc0d4d2f0ed",
        ),
        reason="HostedEngineCore overrides it: the host knows the addresses, no handshake socket is needed",
        removal=_REMOVAL,
    ),
    Patch(
        name="input_queue",
        target=f"{_CORE}._process_input_queue",
        hashes=known(
            v0_32_0="215a7d373e636f988ed1791da1b810d6edb9bff67d353e485d59fba0fc5024af",
            v0_29_0="e220207d92847cdd62de842b167a25e55433ccbd3a92e700f8e0f5ae355e8ef2",
        ),
        reason="the host drains several engines without blocking on one",
        removal=_REMOVAL,
    ),
    Patch(
        name="input_sockets",
        target=f"{_CORE}.process_input_sockets",
        hashes=known(
            v0_32_0="64f70593d3c2b16c5d4a0b2c3d866385c1e98cfccedc7be21d9941660c0db3c0",
            v0_29_0="75740eff4768573c9b2f6b50ff0374505aa51e3272d57de889ab7aa50a5455cb",
        ),
        reason="HostedEngineCore replaces it: InputReceiver does the same and can be told to end",
        removal=_REMOVAL,
    ),
    Patch(
        name="output_sockets",
        target=f"{_CORE}.process_output_sockets",
        hashes=known(
            v0_32_0="507829bea2322b94bd11b7b41fba224372e7d732e35347c8359f3e9efdb28a9e",
            v0_29_0="ab263babeb390472429146f6af8ea5c9511644996fe58aa459ca61628fb2f4b1",
        ),
        reason="HostedEngineCore replaces it: OutputSender sends from the thread that made the output",
        removal=_REMOVAL,
    ),
    Patch(
        name="engine_step",
        target=f"{_CORE}._process_engine_step",
        hashes=known(
            v0_32_0="b894c3b32cc020f7c81bf70b7cafecb3d04708e9d8975276170a2da70de2bcb7",
            v0_29_0="41295db73bb85ebda9cee7c4f32d944e5f973b6bcc0433ff6b152a9368b175b9",
        ),
        reason="HostedEngineCore.step_once does the same and counts the tokens it puts out",
        removal=_REMOVAL,
    ),
    Patch(
        name="engine_shutdown",
        target="vllm.v1.engine.core:EngineCore.shutdown",
        hashes=known(
            v0_32_0="cc934aca9b62e40a5afb36083a5d9565c5967bf88ce9ab9d2d1d077fa61c65ef",
            v0_29_0="cc934aca9b62e40a5afb36083a5d9565c5967bf88ce9ab9d2d1d077fa61c65ef",
        ),
        reason="HostedEngineCore overrides it: the original tears down the process groups of all engines",
        removal=_REMOVAL,
    ),
    Patch(
        name="preemption",
        target="vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        hashes=known(
            v0_32_0="4113f5de8a84ec2532821578e8e3fb6ca4609b14d3d77b4a57d2b641ca427902",
            v0_29_0="1be81e04f8ff2c9f51421c738f7526c7ffe9932ac0a6be492fb9c013aa803ad1",
        ),
        reason="a crashed step preempts its requests so that they can be tried one by one",
        removal=_REMOVAL,
    ),
    Patch(
        name="rope_cache",
        target="vllm.model_executor.layers.rotary_embedding:get_rope",
        hashes=known(
            v0_32_0="eae42f62bf00b0e8e14b14da17e7c9b9cc513f107764fd3aa080ee400595f3bb",
            v0_29_0="40348a51e1ff54e686f7d55ba2028c4bdd4273e9529864c379cf8d690fa82593",
        ),
        reason="its process-wide cache is emptied around a build: models must not share RoPE modules",
        removal="vLLM keeps the RoPE cache per model",
    ),
    Patch(
        name="reduce_capture",
        target="vllm.distributed.device_communicators.custom_all_reduce:CustomAllreduce.custom_all_reduce",
        hashes=known(
            v0_32_0="452e12fef6e25bc33ba37b4d8526434e7fb4019b6bf6d04976347129ca2ba8b4",
            v0_29_0="f436ff5052ca7dbece77f5b5f1e0ab6c1a4ba7033d034619d161dbe5946e8d7b",
        ),
        reason="process_groups.py lets other engines reduce while a capture pauses, in which it does not compute",
        removal="vLLM asks the stream alone whether it is capturing",
    ),
    Patch(
        name="expert_group",
        target="vllm.distributed.parallel_state:initialize_model_parallel",
        hashes=known(
            v0_32_0="8e0981094faa72d1c8cd21c47466be1ebf0dc3c05064cf76e9aa553e99a80878",
            v0_29_0="2c95d9e403f00cf91056d74ede345ce4301fd988ac8fead05733379c8f8eb1a6",
        ),
        reason="PooledCPUWorker adds the expert-parallel group that it leaves out when the first model is dense",
        removal="vLLM makes the group when the first mixture of experts asks for it",
    ),
    Patch(
        name="cpu_mla",
        target="vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl",
        hashes=known(
            v0_32_0="ea66123ad6b81ac29bb7a3e74448d22dd8e8aba90850bebc35318abd073bd7de",
            v0_29_0="ea66123ad6b81ac29bb7a3e74448d22dd8e8aba90850bebc35318abd073bd7de",
        ),
        reason="PooledCPUMLAImpl overrides it: in the arena the blocks of one layer are not one dense run",
        removal="vLLM's CPU MLA backend writes its cache by block stride",
    ),
    Patch(
        name="cpu_memory_check",
        target="vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory",
        hashes=known(
            v0_32_0="6307aefccd79f7448b3de39c3a620e6cb65daa52ff6e919b4c54f443ca02d400",
            v0_29_0="4a00a1be100841cdc30500ac50af6ce9f43e3df565df222197bababbee3ad113",
        ),
        reason="PooledCPUWorker overrides it: the arena is the KV memory, not what is free on the node",
        removal=_REMOVAL,
    ),
    Patch(
        name="client",
        target="vllm.v1.engine.core_client:AsyncMPClient",
        hashes=known(
            v0_32_0="99aaf0f2cc992e206cc5f7afd29a4baf8eab4da2272a8bc8fe77dccd601f86f2",
            v0_29_0="28118c3807c6b142e19d1eeb397bb9f97723ab41eb352e8e7a032e00b530e7f5",
        ),
        reason="PoolEngineClient takes its utility calls and replaces its construction and how it sends and receives",
        removal=_REMOVAL,
    ),
    Patch(
        name="preempted_state",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        hashes=known(
            v0_32_0="326599f31b273b945fd7fc488f5e022c3b2d98d34fb74d2e9ce546e2abcdc892",
            v0_29_0="2e7098333b0c15375fa67f67be70bc8f86845bb329f0322501262eb359244b72",
        ),
        reason="a request that another engine began is entered as this method leaves a preempted one",
        removal=_REMOVAL,
    ),
    Patch(
        name="grammar_state",
        target="vllm.v1.structured_output:StructuredOutputManager",
        hashes=known(
            v0_32_0="1ab59b2d11668ce7b9b03f99168893409b1c229221b56d8cf0aa136cb250f320",
            v0_29_0="215b5f4de1094ef6f10adf5cd56c3c6f0c08a30979d563d285751224fa4a1f40",
        ),
        reason="the grammar of a request that another engine began is advanced as the scheduler does it",
        removal=_REMOVAL,
    ),
    Patch(
        name="tenant_requests",
        target="vllm.v1.engine.output_processor:OutputProcessor.add_request",
        hashes=known(
            v0_32_0="8e0315ddb4d60fdcf5aba8cdb2582506c782522bac45f56799004ba79450c670",
            v0_29_0="9cb93995d340a491e4fe6524d42bb4bc07c04e570b8e2719bd39173a750f570e",
        ),
        reason="the meter of tenants extends it, to know for whom a request is",
        removal=_REMOVAL,
    ),
    Patch(
        name="tenant_tokens",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        hashes=known(
            v0_32_0="9e116796002e75f2193432db1c95c156d29577df8babe18d9108d4430f0a440d",
            v0_29_0="0daaf1825a70c86a6d1fb23d9fb39030cb402eca5a5cc501072f4c21745e48b3",
        ),
        reason="the meter of tenants extends it, to count the tokens that come",
        removal=_REMOVAL,
    ),
    Patch(
        name="scheduling",
        target="vllm.v1.core.sched.scheduler:Scheduler.schedule",
        hashes=known(
            v0_32_0="da4f2cf2fc39c39e76fdefa09b755d72d6b51d39fdc26830f0859ea688ded2ca",
            v0_29_0="6361fde74c842c97b1dfeb31f9c9c3dce0727f5a8bfcd255b90e42725a8fecec",
        ),
        reason="StepWatch wraps it, to know what was handed out and to leave out requests whose KV is under way",
        removal=_REMOVAL,
    ),
    Patch(
        name="step_outputs",
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        hashes=known(
            v0_32_0="85b29db96051135c2e8efcb26637eb46d30b8b7707e947ccf4f86f6fdc613c49",
            v0_29_0="616e84edbb35f1b3c4ec1a73bb06adf93c54e40fca1032fbb987d8b3dc2c754b",
        ),
        reason="StepWatch and RequestWaits wrap it, to know what came back, and to say why a request waited or failed",
        removal=_REMOVAL,
    ),
    Patch(
        name="request_checks",
        target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
        hashes=known(
            v0_32_0="ec36c4501b3260fec1a34cd7c0ec05713024ff87dd85c19c89eb4027b4bf21bf",
            v0_29_0="1c122bdba8e3e3d6f0dd8c6891ef2af78540df3bf4d5c221fafdb8bbfaa4db85",
        ),
        reason="extended: grammars are judged beside the event loop before anything else is done for a request",
        removal=_REMOVAL,
    ),
    Patch(
        name="request_sending",
        target="vllm.v1.engine.async_llm:AsyncLLM._add_request",
        hashes=known(
            v0_32_0="588d66be1f23f19b0dbd50798f30b553631496a8f138211148f26f567ec61d0e",
            v0_29_0="588d66be1f23f19b0dbd50798f30b553631496a8f138211148f26f567ec61d0e",
        ),
        reason="extended: what cannot be sent to an engine is refused",
        removal=_REMOVAL,
    ),
    Patch(
        name="request_answers",
        target="vllm.v1.engine.async_llm:AsyncLLM.generate",
        hashes=known(
            v0_32_0="5bd0ee90459b0e29348891b03548cdc31eef8c9218b3c416d5df4e5e14d1bca2",
            v0_29_0="fffe7dd5ead760c3998bd522555355e79b726995c5bad7bb97c4a3c6c6ab4712",
        ),
        reason="extended: a request that ends because of its grammar says so",
        removal=_REMOVAL,
    ),
    Patch(
        name="params_check",
        target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
        hashes=known(
            v0_32_0="656325c2c4138dbdaaa2cc977b30f4e282449481a2d9ba9f0f170b54e65194a6",
            v0_29_0="d4fcc38cdd4bde7d0624a3ea27a7d5fc7802088e227a50d5a3ed94197b1be13b",
        ),
        reason="extended: it leaves out the validation of grammars that were judged",
        removal=_REMOVAL,
    ),
    Patch(
        name="request_aborts",
        target="vllm.v1.engine.output_processor:OutputProcessor.abort_requests",
        hashes=known(
            v0_32_0="6dd03abb8ea35e7c597e674436bff3d266e763743d53c84743fd97c069a8e7db",
            v0_29_0="162ffd78467d6f7b0307f7a21eeda65903e7c1d749e4ea389da2a1d44c66aaa2",
        ),
        reason="the tracer of requests wraps it: a span ends however its request does",
        removal=_REMOVAL,
    ),
    Patch(
        name="keyword_cache",
        target="vllm.utils.func_utils:supports_kw",
        hashes=known(
            v0_32_0="7a5488dd7849c9ba5792051725a83ca4e1712fad30760f9d3fac108e9c3d27dc",
            v0_29_0="7a5488dd7849c9ba5792051725a83ca4e1712fad30760f9d3fac108e9c3d27dc",
        ),
        reason="its cache is emptied once a model is gone, whose tokenizer it holds",
        removal=_REMOVAL,
    ),
    Patch(
        name="draft_model",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_draft_model",
        hashes=known(
            v0_32_0="048519eb68485f1fd933788d9e1f1bf2795c2a4f69a4079afd9305be2d22f919",
            v0_29_0="048519eb68485f1fd933788d9e1f1bf2795c2a4f69a4079afd9305be2d22f919",
        ),
        reason="tells the draft model whose weights move with its target's, and where the drafter is kept",
        removal=_REMOVAL,
    ),
    Patch(
        name="step_tables_v1",
        target="vllm.v1.worker.block_table:BlockTable.commit_block_table",
        hashes=known(
            v0_32_0="75c23444d22b3ccd2d99ee04337d4b9b91c9049d372896bacbfe44cb9bdcf989",
            v0_29_0="75c23444d22b3ccd2d99ee04337d4b9b91c9049d372896bacbfe44cb9bdcf989",
        ),
        reason="readable_blocks.py takes blocks that left a window out of the rows before they are copied",
        removal="model runner V1 is gone, or does as V2 of vLLM 0.33",
    ),
    Patch(
        name="step_tables_v2",
        target="vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        hashes=known(
            v0_32_0="871191e91a4e328618e01b8611d1e29bfec7f74fbd16f7390e8ef3ec6539762a",
            v0_29_0="871191e91a4e328618e01b8611d1e29bfec7f74fbd16f7390e8ef3ec6539762a",
        ),
        reason="readable_blocks.py takes blocks that left a window, or lie behind the last, out of what a step reads",
        removal="vLLM 0.33 and newer only are supported, and parked slabs lie under what is behind the last block",
    ),
    Patch(
        name="window_frees",
        target="vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_skipped_tokens",
        hashes=known(
            v0_32_0="148ecb450daf8edc19a5226f11f1303bca69d60b2135e7588a5e2a2846be76f7",
            v0_29_0="bfad7ec0a45fec2be8c91adcfe4d6fe09cb0a11c7be838f5a5943683c02a6b5f",
        ),
        reason="readable_blocks.py follows what the scheduler frees behind a sliding window",
        removal="as step_tables_v2",
    ),
    Patch(
        name="chunk_frees",
        target="vllm.v1.core.single_type_kv_cache_manager:ChunkedLocalAttentionManager.get_num_skipped_tokens",
        hashes=known(
            v0_32_0="c5d72e6d861a01b4dc8ea304c06c374c41b92ce63e84beb9f1663e24c332897e",
            v0_29_0="0fef4ea37fcd6886c1b1a5ab277019df0a78102a354fb9426b3691a41b1d69fe",
        ),
        reason="readable_blocks.py follows what the scheduler frees behind a chunk of local attention",
        removal="as step_tables_v2",
    ),
)
